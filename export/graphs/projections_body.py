"""The function bodies of versions 2 and 3 of the TTT operator, in standard operators: `projections_op.py`.

It brings the tokens into the order of the scan one chunk of mini-batches at a time, so only the projections and the
output are whole in memory. Version 3 begins with a state and leaves one. Shapes as in `runtime/ttt_op.py`, with G
mini-batches of a chunk.
"""

from ttt_video_engine.export.graphs.ttt_steps import LINEAR_STEP, MLP_CONSTANTS, MLP_STEP
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, PART_VERSION, OpVersion

CHUNK_TOKENS = 512
"""Tokens of a chunk, about: a chunk has whole mini-batches, and all chunks the same number."""

# Constants and tables. A mini-batch that pads the last chunk repeats the last one with learning rates of 0: it leaves
# the state as it is.
# swap turns the channels (a, b) of each pair into (−b, a), twice gives both channels of a pair the same angle: matrices
# [F, F] and [F/2, F] of 0, 1 and −1, whose products are exact and much faster than moving single channels.
_PROLOGUE = """
    last_axis = Constant <value_ints = [-1]> ()
    token_axis = Constant <value_ints = [-2]> ()
    zero_axis = Constant <value_ints = [0]> ()
    one_axis = Constant <value_ints = [1]> ()
    flat = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one_place = Constant <value_int = 1> ()
    one_count = Constant <value_ints = [1]> ()
    two = Constant <value_int = 2> ()
    epsilon = Constant <value_float = 1e-6> ()
    least_norm = Constant <value_float = 1e-12> ()
    least_std = Constant <value_float = 1e-8> ()
    go_on = Constant <value = bool {1}> ()
    norm_weight_32 = Cast <to = 1> (norm_weight)
    norm_bias_32 = Cast <to = 1> (norm_bias)
    gamma = Unsqueeze (norm_weight_32, one_axis)
    beta = Unsqueeze (norm_bias_32, one_axis)
    gamma_squared = Mul (gamma, gamma)
    gamma_squared_rows = Mul (norm_weight_32, norm_weight_32)
    batch = Shape <start = 0, end = 1> (XQ)
    num_tokens = Shape <start = 1, end = 2> (XQ)
    heads = Shape <start = 0, end = 1> (norm_weight)
    head_dim = Shape <start = 1, end = 2> (norm_weight)
    num_mini_batches = Shape <start = 0, end = 1> (tokens)
    mini_batch_size = Shape <start = 1, end = 2> (tokens)
    unit = ConstantOfShape <value = float[1] {1.0}> (head_dim)
    head_dim_32 = Cast <to = 1> (head_dim)
    one_over_head_dim = Reciprocal (head_dim_32)
    one_32 = Constant <value_float = 1.0> ()
    freedom = Sub (head_dim_32, one_32)
    one_over_freedom = Reciprocal (freedom)

    chunk_tokens = Constant <value_ints = [%CHUNK%]> ()
    fitting = Div (chunk_tokens, mini_batch_size)
    most = Max (fitting, one_count)
    most_less_one = Sub (most, one_count)
    rounded_up = Add (num_mini_batches, most_less_one)
    num_chunks = Div (rounded_up, most)
    chunks_less_one = Sub (num_chunks, one_count)
    evenly_up = Add (num_mini_batches, chunks_less_one)
    chunk_mini_batches = Div (evenly_up, num_chunks)
    padded_mini_batches = Mul (num_chunks, chunk_mini_batches)
    padded_end = Squeeze (padded_mini_batches, zero_axis)
    padded_places = Range (zero, padded_end, one_place)
    last_place = Sub (num_mini_batches, one_count)
    slots = Min (padded_places, last_place)
    is_padding = Greater (padded_places, last_place)
    zero_32 = Constant <value_float = 0.0> ()
    one_if_real = Where (is_padding, zero_32, one_32)
    real_shape = Concat <axis = 0> (num_chunks, flat, one_count, one_count, one_count, one_count)
    real_chunks = Reshape (one_if_real, real_shape)
    chunk_shape = Concat <axis = 0> (num_chunks, flat)
    padded_tokens = Gather <axis = 0> (tokens, slots)
    token_chunks = Reshape (padded_tokens, chunk_shape)
    padded_rate_tokens = Gather <axis = 0> (rate_tokens, slots)
    rate_chunks = Reshape (padded_rate_tokens, chunk_shape)
    half_dim = Shape <start = 2, end = 3> (cos)
    angle_shape = Concat <axis = 0> (num_chunks, flat, one_count, half_dim)
    cos_padded = Gather <axis = 0> (cos, slots)
    cos_chunks = Reshape (cos_padded, angle_shape)
    sin_padded = Gather <axis = 0> (sin, slots)
    sin_chunks = Reshape (sin_padded, angle_shape)

    head_end = Squeeze (head_dim, zero_axis)
    columns = Range (zero, head_end, one_place)
    rows = Unsqueeze (columns, one_axis)
    pair_of_column = Div (columns, two)
    pair_of_row = Div (rows, two)
    in_pair = Equal (pair_of_row, pair_of_column)
    in_pair_32 = Cast <to = 1> (in_pair)
    itself = Equal (rows, columns)
    itself_32 = Cast <to = 1> (itself)
    other = Sub (in_pair_32, itself_32)
    parity = Mod (columns, two)
    twice_parity = Mul (parity, two)
    sign = Sub (twice_parity, one_place)
    sign_32 = Cast <to = 1> (sign)
    swap = Mul (other, sign_32)
    half_end = Squeeze (half_dim, zero_axis)
    half_places = Range (zero, half_end, one_place)
    half_rows = Unsqueeze (half_places, one_axis)
    of_half = Equal (half_rows, pair_of_column)
    twice = Cast <to = 1> (of_half)

    keep_two = Constant <value_ints = [0, 0]> ()
    head_shape = Concat <axis = 0> (keep_two, heads, head_dim)
    scan_shape = Concat <axis = 0> (batch, chunk_mini_batches, mini_batch_size, heads, head_dim)
    rate_shape = Concat <axis = 0> (batch, chunk_mini_batches, mini_batch_size, heads, one_count)
    row_shape = Concat <axis = 0> (batch, flat, heads, head_dim)
    merged_shape = Constant <value_ints = [0, 0, -1]> ()
    batch_and_heads = Concat <axis = 0> (batch, heads)
""".replace("%CHUNK%", str(CHUNK_TOKENS))

# One chunk: q, k, the target γ²·(v − k) standardised, and the learning rates, [G, B, H, C, F] and [G, B, H, C, 1].
# The oracle's target is γ·standardised + β + k, from which the scan subtracts k and β again.
_PREPARE = (
    """
      chunk_next = Identity (chunk_go)
      cos_half = Gather <axis = 0> (cos_chunks, chunk)
      cos_row = MatMul (cos_half, twice)
      sin_half = Gather <axis = 0> (sin_chunks, chunk)
      sin_row = MatMul (sin_half, twice)
      token_rows = Gather <axis = 0> (token_chunks, chunk)
      rate_rows = Gather <axis = 0> (rate_chunks, chunk)
"""
    + "".join(
        """
      X_taken = Gather <axis = 1> (XX, token_rows)
      X_32 = Cast <to = 1> (X_taken)
      X_heads = Reshape (X_32, head_shape)
      X_norm = ReduceL2 (X_heads, last_axis)
      X_length = Max (X_norm, least_norm)
      X_unit = Div (X_heads, X_length)
      X_swapped = MatMul (X_unit, swap)
      X_cos = Mul (X_unit, cos_row)
      X_sin = Mul (X_swapped, sin_row)
      X_rotated = Add (X_cos, X_sin)
      X_split = Reshape (X_rotated, scan_shape)
      X_all = Transpose <perm = [1, 0, 3, 2, 4]> (X_split)
""".replace("X_", f"{name}_").replace("XX", f"X{name}")
        for name in "QK"
    )
    + """
      V_taken = Gather <axis = 1> (XV, token_rows)
      V_32 = Cast <to = 1> (V_taken)
      V_heads = Reshape (V_32, head_shape)
      V_minus_K = Sub (V_heads, K_rotated)
      V_mean = ReduceMean (V_minus_K, last_axis)
      V_centred = Sub (V_minus_K, V_mean)
      V_squares = ReduceSumSquare (V_centred, last_axis)
      V_variance = Mul (V_squares, one_over_freedom)
      V_root = Sqrt (V_variance)
      V_std = Add (V_root, least_std)
      V_standardised = Div (V_centred, V_std)
      target_rows = Mul (V_standardised, gamma_squared_rows)
      target_split = Reshape (target_rows, scan_shape)
      target_all = Transpose <perm = [1, 0, 3, 2, 4]> (target_split)
      logit_rows = Gather <axis = 1> (rate_logits, rate_rows)
      logits_32 = Cast <to = 1> (logit_rows)
      opening = Sigmoid (logits_32)
      rates = Mul (opening, rate_scale)
      rates_split = Reshape (rates, rate_shape)
      rates_in_order = Transpose <perm = [1, 0, 3, 2, 4]> (rates_split)
      real = Gather <axis = 0> (real_chunks, chunk)
      rates_all = Mul (rates_in_order, real)
"""
)

# The mini-batch j of a chunk.
_TAKE = """
        go_next = Identity (go)
        k = Gather <axis = 0> (K_all, j)
        k_T = Transpose <perm = [0, 1, 3, 2]> (k)
        q = Gather <axis = 0> (Q_all, j)
        target = Gather <axis = 0> (target_all, j)
        rate_j = Gather <axis = 0> (rates_all, j)
"""

# After the loop over a chunk: q + LN(f(q)), [B, tokens of the chunk, D], in the operator's dtype.
_READ = """
      read_normalised = LayerNormalization <axis = -1, epsilon = 1e-6> (z_read, unit)
      read_scaled = Mul (read_normalised, gamma)
      read_shifted = Add (read_scaled, beta)
      read = Add (Q_all, read_shifted)
      read_rows = Transpose <perm = [1, 0, 3, 2, 4]> (read)
      read_split = Reshape (read_rows, row_shape)
      read_merged = Reshape (read_split, merged_shape)
      chunk_out = CastLike (read_merged, XQ)
"""

# Chunks [chunks, B, places, D] → tokens [B, L, D]. Row (chunk·B + b)·places + place of all has the token of that place.
_EPILOGUE = """
    token_list = Reshape (tokens, flat)
    token_count = Squeeze (num_tokens, zero_axis)
    all_places = Range (zero, token_count, one_place)
    no_places = Sub (all_places, all_places)
    place_of_token = ScatterElements <axis = 0> (no_places, token_list, all_places)
    chunk_places = Mul (chunk_mini_batches, mini_batch_size)
    chunk_of_token = Div (place_of_token, chunk_places)
    first_place = Mul (chunk_of_token, chunk_places)
    place_in_chunk = Sub (place_of_token, first_place)
    batch_end = Squeeze (batch, zero_axis)
    clips = Range (zero, batch_end, one_place)
    clip_rows = Unsqueeze (clips, one_axis)
    chunk_rows = Mul (chunk_of_token, batch)
    clip_and_chunk = Add (chunk_rows, clip_rows)
    before = Mul (clip_and_chunk, chunk_places)
    out_rows = Add (before, place_in_chunk)
    model_dim = Shape <start = 2, end = 3> (XQ)
    all_rows_shape = Concat <axis = 0> (flat, model_dim)
    all_rows = Reshape (chunks_out, all_rows_shape)
    XQW = Gather <axis = 0> (all_rows, out_rows)
"""


def _start(weights: tuple[str, ...], version: OpVersion) -> str:
    """Inner weights in float32, one copy for each clip of the batch. Of version 3 they are a state, which is that."""
    if version == PART_VERSION:
        return "".join(f"    {name}_first = Cast <to = 1> ({name})\n" for name in weights)
    return "".join(
        f"""
    {name}_32 = Cast <to = 1> ({name})
    {name}_size = Shape <start = -2> ({name})
    {name}_shape = Concat <axis = 0> (batch_and_heads, {name}_size)
    {name}_first = Expand ({name}_32, {name}_shape)
"""
        for name in weights
    )


def projections_body(kind: TTTKind, version: OpVersion) -> str:
    """The function of version 2 or 3 in the textual form of ONNX."""
    text, weights = {"linear": (_LINEAR, ("W1", "b1")), "mlp": (_MLP, ("W1", "b1", "W2", "b2"))}[kind]
    left = "".join(f", {name}_last" for name in weights) if version == PART_VERSION else ""
    return text.replace("%START%", _start(weights, version)).replace("%LEFT%", left)


_INPUTS = "XQ, XK, XV, rate_logits, rate_scale, cos, sin, tokens, rate_tokens, norm_weight, norm_bias"

_LINEAR = f"""
<domain: "{DOMAIN}", opset_import: []>
TTTLinear ({_INPUTS}, W1, b1) => (XQW%LEFT%)
{{
{_PROLOGUE}
%START%
    W1_last, b1_last, chunks_out = Loop (num_chunks, go_on, W1_first, b1_first) <body = chunk_body (
      int64 chunk, bool chunk_go, float[B, H, F, F] W1_chunk, float[B, H, 1, F] b1_chunk
    ) => (bool chunk_next, float[B, H, F, F] W1_left, float[B, H, 1, F] b1_left, chunk_out) {{
{_PREPARE}
      W1_left, b1_left, z_read = Loop (chunk_mini_batches, go_on, W1_chunk, b1_chunk) <body = mini_batch (
        int64 j, bool go, float[B, H, F, F] W, float[B, H, 1, F] b
      ) => (bool go_next, float[B, H, F, F] W_next, float[B, H, 1, F] b_next, float[B, H, C, F] z_q) {{
{_TAKE}
{LINEAR_STEP}
      }}>
{_READ}
    }}>
{_EPILOGUE}
}}
"""

_MLP = f"""
<domain: "{DOMAIN}", opset_import: []>
TTTMLP ({_INPUTS}, W1, b1, W2, b2) => (XQW%LEFT%)
{{
{_PROLOGUE}
{MLP_CONSTANTS}
%START%
    W1_last, b1_last, W2_last, b2_last, chunks_out =
      Loop (num_chunks, go_on, W1_first, b1_first, W2_first, b2_first) <body = chunk_body (
      int64 chunk, bool chunk_go,
      float[B, H, F, K] W1_chunk, float[B, H, 1, K] b1_chunk, float[B, H, K, F] W2_chunk, float[B, H, 1, F] b2_chunk
    ) => (
      bool chunk_next,
      float[B, H, F, K] W1_left, float[B, H, 1, K] b1_left, float[B, H, K, F] W2_left, float[B, H, 1, F] b2_left,
      chunk_out
    ) {{
{_PREPARE}
      W1_left, b1_left, W2_left, b2_left, z_read =
        Loop (chunk_mini_batches, go_on, W1_chunk, b1_chunk, W2_chunk, b2_chunk) <body = mini_batch (
        int64 j, bool go, float[B, H, F, K] W1_j, float[B, H, 1, K] b1_j, float[B, H, K, F] W2_j, float[B, H, 1, F] b2_j
      ) => (
        bool go_next,
        float[B, H, F, K] W1_next, float[B, H, 1, K] b1_next, float[B, H, K, F] W2_next, float[B, H, 1, F] b2_next,
        float[B, H, C, F] z_q
      ) {{
{_TAKE}
{MLP_STEP}
      }}>
{_READ}
    }}>
{_EPILOGUE}
}}
"""
