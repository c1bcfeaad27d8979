"""One claim of the paper each: flags in, table out."""
