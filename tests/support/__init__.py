"""What several tests build on: tiny models and data, launched runs, a loopback store."""
