"""Model families: what is published about each, as plain data (presets, tensor names, chat templates)."""
