"""Who is asking: `Authorization: Bearer KEY` -> a tenant or the administrator, and whether that key may ask for this.

A key is looked up in the database at every request and nothing of it is kept: what is revoked, rotated, expired or
limited is so at the next request, at every replica, whatever else is cached.
"""

from __future__ import annotations

import hmac
from functools import partial
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.services import ServicesDep
from service.errors import AuthenticationError, PermissionDeniedError
from service.keys import Role
from service.tenants import Access, Tenant

_bearer = HTTPBearer(auto_error=False, description="A tenant's API key, or the admin key for /v1/admin.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


INFERENCE_ROUTES = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model:path}"),
    }
)
"""What a key with the role `inference` may ask for; a new route is closed to it until it is written here."""


def _access(request: Request, services: ServicesDep, credentials: _Credentials) -> Access:
    key = _key(credentials)
    access = services.tenants.access(key)
    if access is None:
        if _is_admin(key, services):
            raise PermissionDeniedError("The admin key only opens /v1/admin; use a tenant's API key here.")
        raise AuthenticationError("Incorrect API key provided.")
    tenant_id, state = access.tenant.id, request.state
    state.tenant_id = tenant_id
    state.rate_headers = partial(services.rate_limits.headers, tenant_id, access.limits)
    if access.role is Role.INFERENCE and (request.method, request.scope["route"].path) not in INFERENCE_ROUTES:
        raise PermissionDeniedError(
            f"This key is for inference only: it may not {request.method} {request.url.path}. Use a key of the role "
            "'admin'."
        )
    services.rate_limits.count_request(tenant_id, access.limits)
    return access


AccessDep = Annotated[Access, Depends(_access)]
"""`def route(access: AccessDep)`: the tenant, its limits and the key that was sent; 401 without one."""


def _tenant(access: AccessDep) -> Tenant:
    return access.tenant


def _admin(services: ServicesDep, credentials: _Credentials) -> None:
    key = _key(credentials)
    if _is_admin(key, services):
        return
    if services.tenants.authenticate(key) is not None:
        raise PermissionDeniedError("A tenant's API key does not open /v1/admin; use the admin key.")
    raise AuthenticationError("Incorrect admin key provided.")


def _key_id(access: AccessDep) -> str:
    return access.key_id


def _key(credentials: HTTPAuthorizationCredentials | None) -> str:
    if credentials is None or not credentials.credentials:
        raise AuthenticationError("You did not provide an API key: send 'Authorization: Bearer KEY'.")
    return credentials.credentials


def _is_admin(key: str, services: ServicesDep) -> bool:
    expected = services.admin_key.get_secret_value().encode()
    return hmac.compare_digest(key.encode(), expected)


TenantDep = Annotated[Tenant, Depends(_tenant)]
"""`def route(tenant: TenantDep)`: the tenant whose key was sent; 401 without one."""

KeyIdDep = Annotated[str, Depends(_key_id)]
"""The id of the tenant's key that was sent: who did something, for the record. It opens nothing."""

AdminDep = Annotated[None, Depends(_admin)]
"""`dependencies=[Depends(...)]` or a parameter: only the admin key passes."""
