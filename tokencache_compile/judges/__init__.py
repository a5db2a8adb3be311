"""Judges of whole sets of images and videos: the figures that papers report. Each needs a network whose weights are downloaded once."""
