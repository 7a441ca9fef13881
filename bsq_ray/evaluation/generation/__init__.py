"""Generate images or clips from a trained model and measure them."""
