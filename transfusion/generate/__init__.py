"""Text and images written and drawn by a trained model, against a cached prefix."""
