"""Reports of the quickstart: results of its runs, and minimum accuracies."""
