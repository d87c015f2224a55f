"""Metrics, multi-view scoring and the report page."""
