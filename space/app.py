"""A Space of the Hub with the page of stimg (docs/app.md). `STIMG_MODEL`: ORG/NAME or ORG/NAME@REVISION."""

import os

from modeling_stimg.app import launch

if __name__ == "__main__":
    launch(os.environ.get("STIMG_MODEL"), host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
