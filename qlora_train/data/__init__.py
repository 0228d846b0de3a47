"""Rows of a data set, from their lines on disk to seeded micro-batches, with every row's fate on record."""
