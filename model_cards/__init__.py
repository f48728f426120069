"""From a trained model to a published one: what a Hub repository holds, its card, and the way there."""
