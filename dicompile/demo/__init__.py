"""The bundled demonstration: a small trained class-conditional DiT and what measures its samples."""
