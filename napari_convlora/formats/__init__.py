"""Image files, one module a family, reading and writing side by side; no projects, no models."""
