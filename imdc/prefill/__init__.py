"""Read a prompt: patch, engine, step, observers, backends."""
