"""Who is asking: `Authorization: Bearer KEY` -> a tenant or the administrator. Knows no finer permissions."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.services import ServicesDep
from service.errors import AuthenticationError, PermissionDeniedError
from service.tenants import Tenant, key_id

_bearer = HTTPBearer(auto_error=False, description="A tenant's API key, or the admin key for /v1/admin.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _tenant(request: Request, services: ServicesDep, credentials: _Credentials) -> Tenant:
    key = _key(credentials)
    tenant = services.tenants.authenticate(key)
    if tenant is None:
        if _is_admin(key, services):
            raise PermissionDeniedError("The admin key only opens /v1/admin; use a tenant's API key here.")
        raise AuthenticationError("Incorrect API key provided.")
    request.state.tenant_id = tenant.id
    return tenant


def _admin(services: ServicesDep, credentials: _Credentials) -> None:
    key = _key(credentials)
    if _is_admin(key, services):
        return
    if services.tenants.authenticate(key) is not None:
        raise PermissionDeniedError("A tenant's API key does not open /v1/admin; use the admin key.")
    raise AuthenticationError("Incorrect admin key provided.")


def _key_id(credentials: _Credentials, _: TenantDep) -> str:
    return key_id(_key(credentials)) or ""


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
