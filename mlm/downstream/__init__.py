"""Downstream evaluation of an encoder: labeled tasks, features, probes and sentence scores.

tasks       files, datasets of the hub and GLUE tasks -> texts or words with labels, split
tokens      texts -> ids of limited length, sorted into batches of few shapes
features    the encoder's hidden states of every layer: means of texts, first pieces of words
probe       linear classifiers on these features, with baselines (the only file that imports scikit-learn)
score       pseudo-log-likelihoods and minimal pairs
during_training  probes and minimal pairs at every evaluation of a run
"""
