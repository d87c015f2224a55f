"""Configuration: frozen typed models, YAML presets, key=value overrides."""
