"""What a model can do, and whether its thoughts have anything to do with it."""
