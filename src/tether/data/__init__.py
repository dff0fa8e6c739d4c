"""Files to records to groups to batches."""
