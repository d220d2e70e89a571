"""Images from loaded models: generation and upscaling."""
