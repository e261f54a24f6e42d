"""Attention for the visibility rule of `data_pipelines.batch`."""
