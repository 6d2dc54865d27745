"""Programs as the compilers of absent accelerators make them, kernel by kernel."""
