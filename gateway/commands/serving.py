"""`farebox serve` and `farebox dev`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.shared import ConfigOption, Failed, JsonOption, WrongUsage, load_settings, print_json, reporting

DEFAULT_BLOCK_TIME_S = 2.0

Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the configured port.")]


@reporting
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Instead of the configured address.")] = None,
    port: Port = None,
    as_json: JsonOption = False,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C; requests under way are finished first.

    With --json it prints one line with its address before it starts to listen. Logs go to standard error, and say where it
    listens once it does.
    """
    settings = load_settings(config)
    if not settings.models:
        fix = "Run: farebox config example > farebox.toml, and edit it; or farebox dev, which needs no configuration"
        raise Failed("the configuration names no models: there is nothing to serve", fix)
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update=changes)
    from gateway import app
    from payments.migrate import without_password

    if as_json:
        print_json({"host": settings.host, "port": settings.port, "database": without_password(settings.database)})
    with telling_why_not():
        app.serve(settings)


@contextlib.contextmanager
def telling_why_not() -> Iterator[None]:
    """Turn what keeps a server from starting into a sentence.

    Raises:
        Failed: With it.
    """
    from payments.anchors import AnotherChain
    from payments.chain.rpc import RpcError, RpcUnavailable
    from payments.deposits import FactoryMismatch
    from payments.doctor import TokenMismatch
    from payments.migrate import DatabaseUnreachable, SchemaTooNew
    from payments.store import StoreOwned

    try:
        yield
    except AnotherChain as error:
        raise Failed(str(error), "Use the data_dir that belongs to this chain, or a new one") from None
    except FactoryMismatch as error:
        raise Failed(str(error), "Correct networks.deposit_factory or pay_to") from None
    except TokenMismatch as error:
        raise Failed(f"a token is not what the configuration says: {error}", "Run: farebox doctor") from None
    except (RpcUnavailable, RpcError) as error:
        raise Failed(
            f"a chain cannot be used: {error}", "Check networks.rpc_urls; farebox doctor looks closer"
        ) from None
    except StoreOwned as error:
        raise Failed(str(error), "Stop the other gateway, or give this one another data_dir") from None
    except SchemaTooNew as error:
        raise Failed(str(error), "Use the newer farebox, or another data_dir") from None
    except DatabaseUnreachable as error:
        raise Failed(str(error), "Start the database, and check FAREBOX_DATABASE_URL") from None


@reporting
def dev(
    as_json: JsonOption = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="FILE", exists=True, dir_okay=False, help="Providers, models and settings to use."
        ),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Chain, database and keys are kept here.")
    ] = Path(".farebox/dev"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The gateway's; 0 takes a free one.")] = 0,
    rpc_port: Annotated[int, typer.Option(min=0, max=65535, help="The chain's; 0 takes a free one.")] = 0,
    simulator_port: Annotated[int, typer.Option(min=0, max=65535, help="The providers'; 0 takes a free one.")] = 0,
    block_time: Annotated[
        float | None, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Mine a block at this interval.")
    ] = None,
    automine: Annotated[
        bool | None,
        typer.Option(
            "--automine/--no-automine", help="Mine each transaction at once (the default), or every 2 seconds."
        ),
    ] = None,
) -> None:
    """Start a local chain with tokens and funded wallets, simulated providers, and a gateway.

    Needs no keys and no network. With --json it prints one line with all addresses and keys when everything is ready.
    Ctrl-C stops everything; a second start on the same directory continues from it.
    """
    if automine and block_time is not None:
        raise WrongUsage("--automine and --block-time exclude each other", "Leave one of them out")
    if automine is False and block_time is None:
        block_time = DEFAULT_BLOCK_TIME_S
    from gateway.dev import stack

    status = stack.run(
        as_json=as_json,
        config_file=config,
        data_dir=data_dir,
        port=port,
        rpc_port=rpc_port,
        simulator_port=simulator_port,
        block_time_s=block_time,
    )
    raise typer.Exit(status)
