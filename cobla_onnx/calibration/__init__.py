"""What does the model see: samples, second moments, sensitivities, refit."""
