"""Export: merge the adapter into the dequantised base, verify the result against what was trained, describe it."""
