"""The page of sample records and packs that `python -m data_pipelines.show` writes."""
