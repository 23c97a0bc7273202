//! What stands before every endpoint: who calls, whether they may, and how many calls at once.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{CONNECTION, HeaderValue};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use quarry_objfmt::TenantName;
use tokio::time::timeout;

use super::super::api::{BODY_BYTES_MAX, Refused};
use super::super::endpoints::Endpoint;
use super::super::{ApiError, Engine, Kind};
use super::audit::{Outcome, Told};
use super::tenanted::Tenanted;
use super::{Access, Caller, Needs};
use crate::places::Place;

/// Calls of one tenant at once: some take as long as the store does, and all share the daemon's connections.
const TENANT_CALLS_MAX: usize = 32;

/// How long a request's body may take to come.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

/// The engine as far as the caller reaches. Handlers have no other way to one.
pub struct Allowed(pub Arc<dyn Engine>);

/// What only operators see of the control plane itself. Nobody else's handlers have it.
#[derive(Clone)]
pub struct Operating(pub Arc<Access>);

impl<S: Sync> FromRequestParts<S> for Operating {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let found = parts.extensions.get::<Self>().cloned();
        found.ok_or_else(|| {
            let message = "this is for the role operator";
            ApiError::new(Kind::Denied, message, "ask the operator of the daemon")
        })
    }
}

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
        if self.endpoint.needs == Needs::Nothing {
            parts.extensions.insert(Reach(Arc::clone(&self.engine)));
            return Ok(next.run(Request::from_parts(parts, body)).await);
        }
        let audit = self.access.audit.as_ref();
        let mut told = Told::new(self.endpoint, &parts);
        let mut admitted = match self.admit(&parts, &mut told).await {
            Ok(admitted) => admitted,
            Err(refused) => {
                if let Some(audit) = audit {
                    audit.denied(told, &refused).await;
                }
                return Ok(turn_away(refused, body).await);
            }
        };
        let call = admitted.call.take();
        parts
            .extensions
            .insert(Reach(self.reach(&admitted.caller, call)));
        if matches!(admitted.caller, Caller::Operator { .. }) {
            parts.extensions.insert(Operating(Arc::clone(&self.access)));
        }
        // All of it, also where no handler looks at it: see `turn_away`.
        let body = whole_body(body).await?;
        let Some(audit) = audit else {
            return Ok(next.run(Request::from_parts(parts, body.into())).await);
        };
        if self.endpoint.method == Method::GET {
            let response = next.run(Request::from_parts(parts, body.into())).await;
            if told.is_of_another(&admitted.caller) {
                let outcome = Outcome::of(&response);
                audit.asked_for_anothers(told, outcome).await;
            }
            return Ok(response);
        }
        told.name_what_is_in(&body);
        let entry = audit.begin(told).await?;
        let response = next.run(Request::from_parts(parts, body.into())).await;
        entry.end(Outcome::of(&response)).await;
        Ok(response)
    }

    /// Who calls, if they may.
    async fn admit(&self, parts: &Parts, told: &mut Told) -> Result<Admitted, Refused> {
        let caller = self.access.identify(parts).await?;
        told.caller(&caller);
        if !self.endpoint.needs.met_by(&caller) {
            return Err(denied(self.endpoint).into());
        }
        let call = match caller.tenant() {
            None => None,
            Some(tenant) => Some(
                self.access
                    .calls
                    .take(tenant, TENANT_CALLS_MAX)
                    .ok_or_else(busy)?,
            ),
        };
        Ok(Admitted { caller, call })
    }

    /// The engine as far as `caller` reaches. It keeps the place among the calls: what is spawned with it goes on when
    /// the caller has hung up, and counts for as long.
    fn reach(&self, caller: &Caller, call: Option<Place<TenantName>>) -> Arc<dyn Engine> {
        let engine = Arc::clone(&self.engine);
        match caller {
            Caller::Operator { .. } => engine,
            Caller::Tenant { tenant, .. } => Arc::new(Tenanted::new(
                engine,
                tenant.clone(),
                self.access.tenant_attach,
                call,
            )),
        }
    }
}

/// Somebody who may, and the place among the calls under way.
struct Admitted {
    caller: Caller,
    call: Option<Place<TenantName>>,
}

/// The answer to a call that may not be. With a body left unread the connection would be closed under whoever sends the
/// next request on it: so that of a caller who is known is read, and a stranger is told that this is the end.
async fn turn_away(refused: Refused, body: Body) -> Response {
    let is_stranger = refused.0 == StatusCode::UNAUTHORIZED;
    if !is_stranger {
        // What is too long or too late ends the connection all the same.
        let _ = whole_body(body).await;
    }
    let mut response = refused.into_response();
    if is_stranger {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    response
}

/// The body of a request, which is small and soon there or refused.
async fn whole_body(body: Body) -> Result<Bytes, Refused> {
    match timeout(BODY_TIME_MAX, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => {
            let remedy = format!("send at most {BODY_BYTES_MAX} bytes");
            let error = ApiError::invalid("the body cannot be read", remedy);
            Err(Refused(StatusCode::PAYLOAD_TOO_LARGE, error))
        }
        Err(_) => {
            let error = ApiError::invalid("the body takes too long", "send it at once");
            Err(Refused(StatusCode::REQUEST_TIMEOUT, error))
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
