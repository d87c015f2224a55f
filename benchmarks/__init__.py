"""Side-by-side measurements, each writing one JSON result."""
