"""Forms: how the tensors of a method make its update. One pure function each, for training, export and analysis."""
