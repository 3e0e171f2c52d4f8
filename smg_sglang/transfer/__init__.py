"""Page layouts and the copies between device pools and host pages."""
