"""The only package that imports SGLang: entry points, flags, prefix cache, CPU platform."""
