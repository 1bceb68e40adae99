"""One mini-batch of the TTT scan in standard operators: lines of the function body of both versions of the operator.

The lines read k, k_T, q, target and rate_j of the mini-batch, gamma_squared [H, 1, F] and the inner weights. They write
the next inner weights and z_q, the inner output for q. Shapes as in `ttt_op.py`.
"""

# One mini-batch: the backward pass of LayerNorm, from z [B, H, C, F], the inner output for k, to `projected`.
# The step is `projected` times the learning rate of the token over std. TensorRT's parser does not support
# LayerNormalization with more than one output, so the standard deviation is computed here.
INNER_GRADIENT = """
      z_mean = ReduceMean (z, last_axis)
      centred = Sub (z, z_mean)
      squares = ReduceSumSquare (centred, last_axis)
      variance = Mul (squares, one_over_head_dim)
      variance_eps = Add (variance, epsilon)
      std = Sqrt (variance_eps)
      normalised = Div (centred, std)
      scaled = Mul (gamma_squared, normalised)
      grad = Sub (scaled, target)
      grad_mean = ReduceMean (grad, last_axis)
      grad_along = Mul (grad, normalised)
      along_mean = ReduceMean (grad_along, last_axis)
      along = Mul (normalised, along_mean)
      without_mean = Sub (grad, grad_mean)
      projected = Sub (without_mean, along)
"""

LINEAR_STEP = f"""
      kW = MatMul (k, W)
      z = Add (kW, b)
{INNER_GRADIENT}
      rate_over_std = Div (rate_j, std)
      step = Mul (projected, rate_over_std)
      W_step = MatMul (k_T, step)
      W_next = Sub (W, W_step)
      b_step = ReduceSum (step, token_axis)
      b_next = Sub (b, b_step)
      qW = MatMul (q, W_next)
      z_q = Add (qW, b_next)
"""

# GELU in tanh form is x·σ(u) with u = √(8/π)·(x + 0.044715x³), because ½(1 + tanh(u/2)) = σ(u). That saves elementwise
# passes over the hidden layer. Its derivative is σ + x·σ·(1 − σ)·u′, with u′ = u_linear + 3·u_cubic·x².
MLP_CONSTANTS = """
    one = Constant <value_float = 1.0> ()
    three = Constant <value_float = 3.0> ()
    u_linear = Constant <value_float = 1.59576912> ()
    u_cubic = Constant <value_float = 0.0713548163> ()
"""

MLP_STEP = f"""
      kW1 = MatMul (k, W1_j)
      z1 = Add (kW1, b1_j)
      z1_squared = Mul (z1, z1)
      cubic_term = Mul (z1_squared, u_cubic)
      u_over_z1 = Add (cubic_term, u_linear)
      u = Mul (z1, u_over_z1)
      cdf = Sigmoid (u)
      hidden = Mul (z1, cdf)
      hW2 = MatMul (hidden, W2_j)
      z = Add (hW2, b2_j)
{INNER_GRADIENT}
      rate_over_std = Div (rate_j, std)
      step2 = Mul (projected, rate_over_std)
      W2_T = Transpose <perm = [0, 1, 3, 2]> (W2_j)
      step_hidden = MatMul (step2, W2_T)
      slope_cubic = Mul (cubic_term, three)
      u_slope = Add (slope_cubic, u_linear)
      one_minus_cdf = Sub (one, cdf)
      hidden_slope = Mul (hidden, one_minus_cdf)
      slope_product = Mul (hidden_slope, u_slope)
      gelu_slope = Add (slope_product, cdf)
      step1 = Mul (step_hidden, gelu_slope)
      W1_step = MatMul (k_T, step1)
      W1_next = Sub (W1_j, W1_step)
      b1_step = ReduceSum (step1, token_axis)
      b1_next = Sub (b1_j, b1_step)
      hidden_T = Transpose <perm = [0, 1, 3, 2]> (hidden)
      W2_step = MatMul (hidden_T, step2)
      W2_next = Sub (W2_j, W2_step)
      b2_step = ReduceSum (step2, token_axis)
      b2_next = Sub (b2_j, b2_step)
      qW1 = MatMul (q, W1_next)
      q1 = Add (qW1, b1_next)
      q_hidden = Gelu <approximate = "tanh"> (q1)
      qW2 = MatMul (q_hidden, W2_next)
      z_q = Add (qW2, b2_next)
"""
