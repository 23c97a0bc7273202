//! What stands before every endpoint: who calls, whether they may, and how many calls at once.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use parking_lot::Mutex;
use quarry_objfmt::TenantName;

use super::super::api::Refused;
use super::super::endpoints::Endpoint;
use super::super::{ApiError, Engine, Kind};
use super::tenanted::Tenanted;
use super::{Access, Caller};

/// Calls of one tenant at once: some take as long as the store does, and all share the daemon's connections.
const TENANT_CALLS_MAX: usize = 32;

/// The engine as far as the caller reaches. Handlers have no other way to one.
pub struct Allowed(pub Arc<dyn Engine>);

/// The engine, put beside a request for its handler.
#[derive(Clone)]
pub(in super::super) struct Reach(pub Arc<dyn Engine>);

impl<S: Sync> FromRequestParts<S> for Allowed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let reach = parts.extensions.get::<Reach>();
        reach
            .map(|Reach(engine)| Self(Arc::clone(engine)))
            .ok_or_else(|| ApiError::internal("an endpoint is served without its guard"))
    }
}

/// How many calls of each tenant are under way; of those that have any.
#[derive(Debug, Default)]
pub(super) struct Calls(Arc<Mutex<HashMap<TenantName, usize>>>);

/// A call under way.
struct Call {
    of: TenantName,
    all: Arc<Mutex<HashMap<TenantName, usize>>>,
}

impl Calls {
    fn begin(&self, tenant: &TenantName) -> Option<Call> {
        let mut all = self.0.lock();
        let count = all.entry(tenant.clone()).or_default();
        if *count >= TENANT_CALLS_MAX {
            return None;
        }
        *count += 1;
        Some(Call {
            of: tenant.clone(),
            all: Arc::clone(&self.0),
        })
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(count) = all.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.of);
            }
        }
    }
}

/// What an endpoint's guard knows.
#[derive(Clone)]
pub struct Guard {
    /// How callers are told.
    pub access: Arc<Access>,
    /// Everything.
    pub engine: Arc<dyn Engine>,
    /// What is guarded.
    pub endpoint: &'static Endpoint,
}

/// Lets a request through to its endpoint, with an engine that reaches as far as its caller does.
pub(in super::super) async fn guard(
    State(guard): State<Guard>,
    request: Request,
    next: Next,
) -> Response {
    guard
        .pass(request, next)
        .await
        .unwrap_or_else(|refused| refused.into_response())
}

impl Guard {
    async fn pass(&self, request: Request, next: Next) -> Result<Response, Refused> {
        let (mut parts, body) = request.into_parts();
        if self.endpoint.needs == super::Needs::Nothing {
            parts.extensions.insert(Reach(Arc::clone(&self.engine)));
            return Ok(next.run(Request::from_parts(parts, body)).await);
        }
        let caller = self.access.identify(&parts).await?;
        if !self.endpoint.needs.met_by(&caller) {
            return Err(denied(self.endpoint).into());
        }
        let _call = match caller.tenant() {
            None => None,
            Some(tenant) => Some(self.access.calls.begin(tenant).ok_or_else(busy)?),
        };
        parts.extensions.insert(Reach(self.reach(&caller)));
        parts.extensions.insert(caller);
        Ok(next.run(Request::from_parts(parts, body)).await)
    }

    /// The engine as far as `caller` reaches.
    fn reach(&self, caller: &Caller) -> Arc<dyn Engine> {
        let engine = Arc::clone(&self.engine);
        match caller {
            Caller::Operator { .. } => engine,
            Caller::Tenant { tenant, .. } => Arc::new(Tenanted::new(
                engine,
                tenant.clone(),
                self.access.tenant_attach,
            )),
        }
    }
}

fn denied(endpoint: &Endpoint) -> ApiError {
    let needs = endpoint.needs.as_str();
    let message = format!(
        "{} {} is for the role {needs}",
        endpoint.method, endpoint.path
    );
    ApiError::new(Kind::Denied, message, "ask the operator of the daemon")
}

fn busy() -> Refused {
    let message = format!("the tenant has {TENANT_CALLS_MAX} calls under way already");
    let error = ApiError::new(Kind::Unavailable, message, "wait for them to end");
    Refused(StatusCode::TOO_MANY_REQUESTS, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_a_tenant_are_bounded_and_given_back() {
        let (calls, acme) = (Calls::default(), TenantName::new("acme").unwrap());
        let mut under_way: Vec<_> = (0..TENANT_CALLS_MAX).map(|_| calls.begin(&acme)).collect();
        assert!(under_way.iter().all(Option::is_some));
        assert!(calls.begin(&acme).is_none());
        assert!(calls.begin(&TenantName::new("other").unwrap()).is_some());
        under_way.pop();
        assert!(calls.begin(&acme).is_some());
        drop(under_way);
        assert!(calls.0.lock().is_empty());
    }
}
