"""Mathematics of the methods: tensors and callables in, tensors out. Imports torch only."""
