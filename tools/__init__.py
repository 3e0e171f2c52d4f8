"""What a checkout needs besides the package: models that come without a hub, and `make serve`."""
