"""Configuration: frozen typed models, YAML presets, key=value overrides."""

PHASES = ("teacher", "representation", "distill", "detect-teacher", "detect-representation", "detect-distill")
