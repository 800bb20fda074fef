"""Files that are complete or not there: manifests, exchanges of directories, directories of runs."""
