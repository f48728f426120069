"""Domains without labels: k-means and Leiden on an embedding, with as many clusters as there are true domains."""

from modeling_stimg.clustering import k_means, leiden

CLUSTERINGS = {"k-means": k_means, "leiden": leiden}
