"""What every round of a call did, noted for whoever asks, and the page that shows it."""
