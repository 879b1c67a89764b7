"""A correct little runtime for the tests of its suite: linear stages in processes of their own, joined by pipes."""

import contextlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import wait

import torch
import torch.fx.experimental.symbolic_shapes  # a first backward loads it: here once, not in every worker


class WorkerError(RuntimeError):
    """A worker failed; the message names it."""


def serve(stage, connection, parents):
    """Run one stage until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    for inherited in parents:
        inherited.close()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task, values = connection.recv()
            try:
                answer = ("done", forward(stage, values) if task == "forward" else backward(stage, values))
            except Exception:
                answer = ("failed", traceback.format_exc())
            connection.send(answer)


def forward(stage, values):
    stage.given = torch.from_numpy(values).requires_grad_()
    stage.output = stage(stage.given)
    return stage.output.detach().numpy()


def backward(stage, values):
    stage.zero_grad()
    stage.output.backward(torch.from_numpy(values))
    return stage.given.grad.numpy(), [parameter.grad.numpy() for parameter in stage.parameters()]


class Pipeline:
    """Runs the layers of an ``nn.Sequential``, each in its own process."""

    def __init__(self, module, timeout=1.0):
        if timeout <= 0:
            raise ValueError(f"timeout must be > 0, got {timeout}")
        context = multiprocessing.get_context("fork")  # quick to start; torch runs one thread here
        self.timeout, self.connections, self.processes = timeout, [], []
        self.names = [f"{name}.{key}" for name, stage in module.named_children() for key, _ in stage.named_parameters()]
        for index, stage in enumerate(module):
            here, there = context.Pipe()
            self.connections.append(here)
            arguments = (stage, there, [*self.connections])
            process = context.Process(target=serve, args=arguments, name=f"stage-{index}", daemon=True)
            process.start()
            there.close()
            self.processes.append(process)

    def step(self, inputs):
        """Return the output, and the gradients of half its squared length by the parameters' names."""
        try:
            values = inputs.numpy()
            for index in range(len(self.processes)):
                values = self.ask(index, "forward", values)
            output, gradients = torch.from_numpy(values), []
            for index in reversed(range(len(self.processes))):
                values, found = self.ask(index, "backward", values)
                gradients = [*found, *gradients]
        except BaseException:
            self.close()
            raise
        return output, dict(zip(self.names, map(torch.from_numpy, gradients), strict=True))

    def ask(self, index, task, values):
        """Send a task to a worker, and wait for the answer, for a death of any worker, or for the time to be up."""
        connection = self.connections[index]
        with contextlib.suppress(BrokenPipeError):
            connection.send((task, values))
        ready = wait([connection, *(process.sentinel for process in self.processes)], self.timeout)
        for process in self.processes:
            if process.sentinel in ready:
                process.join()
                raise WorkerError(f"worker {process.name} died with exit code {process.exitcode}")
        if not ready:
            raise TimeoutError(f"worker {self.processes[index].name} did not answer within {self.timeout:g} s")
        outcome, answer = connection.recv()
        if outcome == "failed":
            raise WorkerError(f"worker {self.processes[index].name} failed:\n{answer}")
        return answer

    def close(self):
        """Kill the workers, and wait for their end."""
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()

    def workers(self):
        """Return the process ids of the workers by name."""
        return {process.name: process.pid for process in self.processes}
