"""Pure functions of tensors, unreduced; ``reduce`` turns their entries into a sum and the count that it stands for."""
