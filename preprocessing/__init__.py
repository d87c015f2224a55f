"""Offline half: a data set of videos to shards."""
