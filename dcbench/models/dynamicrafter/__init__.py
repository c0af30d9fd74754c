"""The reference DynamiCrafter. `load` is the entry point of its cards."""
