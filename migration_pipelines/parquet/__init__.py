"""A collection as a folder of Parquet files: the folder, its manifest, one file, and files of other tools."""
