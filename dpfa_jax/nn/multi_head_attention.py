from flax import nnx
from dpfa_jax.nn.attention_fn import attention_fn
class MultiHeadAttention(nnx.MultiHeadAttention):
    def __init__(self, *args, attention_fn=attention_fn, **kwargs):
        super().__init__(*args, attention_fn=attention_fn, **kwargs)
