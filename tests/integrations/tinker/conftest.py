"""A server on this machine that answers tinker's client for a bigram model: its transport and its data are tinker's own."""

from __future__ import annotations

import importlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

VOCABULARY = 7


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def service(server, monkeypatch):
    """A ServiceClient of tinker's, connected to that server."""
    import tinker  # noqa: PLC0415 -- in its own environment only

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with_server = tinker.ServiceClient(base_url=f"http://127.0.0.1:{server.server_port}", api_key="tml-none")
    yield with_server
    with_server.holder.close()


class Server(ThreadingHTTPServer):
    """What the client has asked for, and the model: logits of the next token given this one."""

    daemon_threads = True

    def __init__(self, *args):
        super().__init__(*args)
        import torch  # noqa: PLC0415

        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))
        self.config = {"fwdbwd_max_chunk_len": 2, "use_pyqwest_transport": False}
        self.requests, self.results, self.losses, self.lock = [], {}, {}, threading.Lock()

    def log_prob(self, datum):
        """Of the target tokens of a datum."""
        import torch  # noqa: PLC0415

        logits = self.weight[torch.tensor(datum.model_input.to_ints())]
        return logits.log_softmax(-1).gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]

    def promise(self, result):
        """A request whose result is fetched later."""
        self.results[str(len(self.results))] = result
        return {"request_id": str(len(self.results) - 1)}

    def forward_backward(self, body):
        """Log-probs, and for a backward pass the gradient of a cross-entropy or of an uploaded loss."""
        import torch  # noqa: PLC0415
        from tinker.proto import tinker_public_pb2 as wire  # noqa: PLC0415

        message = wire.ForwardBackwardRequest.FromString(body)
        data = [decoded(datum) for datum in message.data]
        log_probs = [self.log_prob(datum) for datum in data]
        total, metrics = torch.zeros(()), {}
        if message.loss_fn == "custom":
            loss = self.losses[message.loss_fn_config_v2["loss_id"].text]
            for datum, log_prob in zip(data, log_probs, strict=True):
                value, parts = evaluated(loss, log_prob, datum)
                total = total + value
                metrics = {name: metrics.get(name, 0.0) + float(part) for name, part in parts.items()}
        else:
            for datum, log_prob in zip(data, log_probs, strict=True):
                total = total - (log_prob * datum.loss_fn_inputs["weights"].to_torch()).sum()
        self.requests.append((message.loss_fn, message.forward_only, len(data)))
        if not message.forward_only:
            total.backward()
        metrics["loss:sum"] = float(total.detach())
        return self.promise(encoded(log_probs, metrics))

    def optim_step(self, learning_rate):
        """One step downhill."""
        self.weight.data -= learning_rate * self.weight.grad
        self.weight.grad = None
        return self.promise({"metrics": {}})

    def create_custom_loss(self, body):
        """Keep an uploaded loss."""
        self.losses[f"loss-{len(self.losses)}"] = json.loads(body)
        return self.promise({"type": "create_custom_loss", "loss_id": f"loss-{len(self.losses) - 1}"})


class Handler(BaseHTTPRequestHandler):
    """The few requests that creating a client and training with it make."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server, name = self.server, self.path.removeprefix("/api/v1/")
        with server.lock:
            if name == "forward_backward":
                try:
                    answer = server.forward_backward(body)
                except Exception as error:  # noqa: BLE001 -- else the client asks again, for ever
                    answer = server.promise({"error": repr(error)})
            elif name == "create_custom_loss":
                answer = server.create_custom_loss(body)
            elif name == "optim_step":
                answer = server.optim_step(json.loads(body)["adam_params"]["learning_rate"])
            elif name == "create_model":
                answer = server.promise({"type": "create_model", "model_id": "model"})
            elif name == "retrieve_future":
                answer = server.results[json.loads(body)["request_id"]]
            else:
                answer = {
                    "client/config": server.config,
                    "client/dynamic_config": {},
                    "create_session": {"session_id": "session"},
                    "session_heartbeat": {"type": "session_heartbeat"},
                    "telemetry": {"status": "accepted"},
                    "get_info": {"model_id": "model", "model_data": {"arch": "bigram", "model_name": "bigram"}},
                }[name]
        binary = isinstance(answer, bytes)
        payload = answer if binary else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf" if binary else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        """Nothing."""


def encoded(log_probs, metrics):
    """A result in tinker's wire format: tensors end to end, and where each begins, in bytes."""
    import numpy as np  # noqa: PLC0415
    from tinker.proto import tinker_public_pb2 as wire  # noqa: PLC0415

    message = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=metrics)
    record = message.loss_fn_outputs.add(num_datums=len(log_probs))
    arrays = [x.detach().numpy() for x in log_probs]
    tensor = record.fields["logprobs"]
    tensor.dtype = wire.DTYPE_FLOAT32
    tensor.data = np.concatenate(arrays).tobytes()
    tensor.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
    return message.SerializeToString()


def decoded(message):
    """A datum from tinker's wire format."""
    import numpy as np  # noqa: PLC0415
    from tinker import Datum, ModelInput  # noqa: PLC0415
    from tinker.proto.response_conv import _tensor_data_from_proto  # noqa: PLC0415

    tokens = np.concatenate([np.frombuffer(chunk.encoded_text.tokens, np.int32) for chunk in message.model_input])
    return Datum(
        ModelInput.from_ints(tokens.tolist()), {name: _tensor_data_from_proto(x) for name, x in message.loss_fn_inputs.items()}
    )


def evaluated(loss, log_prob, datum):
    """An uploaded loss, rebuilt from its nodes by the names of torch's functions, of operators and of tensor methods."""
    import torch  # noqa: PLC0415

    columns = {"logprobs": log_prob, **{name: x.to_torch() for name, x in datum.loss_fn_inputs.items()}}
    values = {}

    def of(argument):
        if isinstance(argument, list):
            return [of(part) for part in argument]
        if not isinstance(argument, dict):
            return argument
        ((kind, content),) = argument.items()
        forms = {
            "ref": values.get,
            "tuple": lambda parts: tuple(map(of, parts)),
            "dict": lambda parts: {key: of(part) for key, part in parts.items()},
            "dtype": lambda name: getattr(torch, name),
            "float": float,
        }
        return forms[kind](content)

    for node in loss["graph"]["nodes"]:
        arguments, keywords = [of(x) for x in node["args"]], {key: of(x) for key, x in node["kwargs"].items()}
        if node["op"] == "placeholder":
            values[node["name"]] = columns[node["target"]]
        elif node["op"] == "output":
            return arguments[0]
        elif node["op"] == "call_method":
            values[node["name"]] = getattr(arguments[0], node["target"])(*arguments[1:], **keywords)
        else:
            module, _, function = node["target"].rpartition(".")
            assert module in ("torch", "operator")
            values[node["name"]] = getattr(importlib.import_module(module), function)(*arguments, **keywords)
    raise AssertionError
