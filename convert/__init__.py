from dicetalk_jax import interrupt

interrupt.watch_imports()
