"""Under `torch.compile`, without a graph break: the same numbers as eager ones, compiled once."""

# compilation


def assert_compiled_equals_eager(function, objectives, *, shapes=((4, 6),), rtol=1e-12, **options):
    torch._dynamo.reset()  # noqa: SLF001 -- the documented way
    compiled = torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)
    for i, objective in enumerate(objectives):
        for shape in shapes if i == 0 else shapes[:1]:
            data, same = batch(shape, seed=i), batch(shape, seed=i)
            loss, statistics = compiled(objective, **data)
            expected, expected_statistics = function(objective, **same)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=rtol, atol=rtol)
            torch.testing.assert_close(data["log_prob"].grad, same["log_prob"].grad, rtol=rtol, atol=rtol)
            for name, statistic in expected_statistics.items():
                torch.testing.assert_close(tuple(statistics[name]), tuple(statistic), rtol=rtol, atol=rtol, equal_nan=True)


def test_compile_with_diagnostics():
    assert_compiled_equals_eager(policy_loss, [DPPO(delta=0.15)])


def loss_alone(objective, **data):
    return policy_loss(objective, **data)[0], {}


def token_losses(objective, **data):
    return token_loss(objective, **data).sum(), {}


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_compile_with_changing_thresholds_and_shapes(dynamic):
    objectives = [DRPO(delta=0.1), DRPO(delta=0.2)]
    assert_compiled_equals_eager(token_losses, objectives, shapes=((4, 6), (5, 7)), dynamic=dynamic)
    assert_compiled_equals_eager(loss_alone, objectives, dynamic=dynamic)


def test_compile_every_kind_of_objective_through_one_function():
    objectives = [OBJECTIVES[i] for i in (2, 3, 5, 6, 8, 9, 10)]
    assert len({type(objective) for objective in objectives}) == 6
    assert_compiled_equals_eager(token_losses, objectives)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_code_that_uses_the_objective_before_and_after_the_loss(dynamic):
    # Dynamo can't hand a float attribute that it lifted into an autograd.Function back to the code around it
    # ("Argument 'item' of Node does not belong to this Graph"), so no objective may be an argument of one
    def step(objective, **data):
        loss = token_loss(objective, **data).sum()
        after = diagnostics(objective, **data | {"log_prob": data["log_prob"].detach()}, xp=xp)
        return loss, {"weight_mean": after["weight_mean"]}

    assert_compiled_equals_eager(step, [DRPO(delta=0.1), DRPO(delta=0.2)], dynamic=dynamic)


@each_reduction
def test_compile_reductions(reduction):
    def step(objective, **data):
        weights = torch.ones_like(data["advantages"])
        return policy_loss(objective, **data, reduction=reduction, token_weights=weights, normalizer=3.0)[0], {}

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_compile_packed():
    def step(objective, **data):
        packed = {name: tensor.reshape(-1) for name, tensor in data.items()}
        ids = torch.arange(24) // 6
        return policy_loss(objective, **packed, reduction=sequence_mean_token_mean, segment_ids=ids)[0], {}

    assert_compiled_equals_eager(step, [DRPO(delta=0.15)])


def test_compile_with_inductor():
    assert_compiled_equals_eager(loss_alone, [DRPO(delta=0.15)], backend="inductor", rtol=1e-10)


def test_compiled_double_backward_is_refused():
    torch._dynamo.reset()  # noqa: SLF001
    data = batch()
    compiled = torch.compile(lambda data: policy_loss(DRPO(delta=0.15), **data)[0], fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(data), data["log_prob"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"not have been used"):
        torch.autograd.grad(first.sum(), data["log_prob"])
