"""What is in the file: the model, its layers, its costs."""
