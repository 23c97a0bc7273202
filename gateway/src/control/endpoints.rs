//! The table of endpoints: what there is, and what role it needs. The router, the guard before each endpoint,
//! the API's document and the table of the tests are made of it.
//!
//! **Invariant:** there is no way to an endpoint but through this table, and its guard.

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{MethodFilter, MethodRouter, on};

use super::access::guard::{Reach, guard};
use super::access::{Access, Caller, Guard, Needs};
use super::api::{self, BODY_BYTES_MAX};
use super::error::response;
use super::{ApiError, Engine, Kind, chores, retain, token, trash, warm};

/// Something that can be asked for.
pub struct Endpoint {
    /// By what method.
    pub method: Method,
    /// Its path, with the names of what varies in braces.
    pub path: &'static str,
    /// The least role of who asks.
    pub needs: Needs,
    /// What it does, in a sentence.
    pub about: &'static str,
    serve: fn(MethodFilter) -> MethodRouter,
}

impl Endpoint {
    /// Its method, as it is written.
    pub(super) fn method_name(&self) -> &'static str {
        // The constants' names are static, a method's is not.
        [Method::GET, Method::POST, Method::PUT, Method::PATCH]
            .iter()
            .zip(["GET", "POST", "PUT", "PATCH"])
            .find(|(method, _)| **method == self.method)
            .map_or("DELETE", |(_, name)| name)
    }

    fn router(&self) -> MethodRouter {
        let filter = MethodFilter::try_from(self.method.clone());
        (self.serve)(filter.expect("the table has common methods only"))
    }
}

const fn at(
    method: Method,
    path: &'static str,
    needs: Needs,
    about: &'static str,
    serve: fn(MethodFilter) -> MethodRouter,
) -> Endpoint {
    Endpoint {
        method,
        path,
        needs,
        about,
        serve,
    }
}

/// All endpoints.
#[rustfmt::skip]
pub static ENDPOINTS: LazyLock<Vec<Endpoint>> = LazyLock::new(|| {
    use Needs::{Admin, Nothing, Operator, Read};
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const DELETE: Method = Method::DELETE;
    vec![
        at(GET, "/v1/tenants", Read, "All tenants; to a tenant, itself.", |m| on(m, api::list_tenants)),
        at(POST, "/v1/tenants", Operator, "Make a tenant.", |m| on(m, api::create_tenant)),
        at(DELETE, "/v1/tenants/{tenant}", Operator, "Delete a tenant that has no volumes.", |m| on(m, api::delete_tenant)),
        at(GET, "/v1/volumes", Read, "Volumes.", |m| on(m, api::list_volumes)),
        at(POST, "/v1/volumes", Admin, "Make a volume that reads as zeroes.", |m| on(m, api::create_volume)),
        at(GET, "/v1/volumes/{tenant}/{volume}", Read, "A volume, or a snapshot of it as it is attached.", |m| on(m, api::show_volume)),
        at(DELETE, "/v1/volumes/{tenant}/{volume}", Admin, "Put a volume into the trash.", |m| on(m, api::delete_volume)),
        at(POST, "/v1/volumes/{tenant}/{volume}/attach", Admin, "Attach a volume, or a snapshot, to the host.", |m| on(m, api::attach)),
        at(POST, "/v1/volumes/{tenant}/{volume}/detach", Admin, "Detach it.", |m| on(m, api::detach)),
        at(POST, "/v1/volumes/{tenant}/{volume}/resize", Admin, "Change a volume's size.", |m| on(m, api::resize)),
        at(POST, "/v1/volumes/{tenant}/{volume}/retain", Admin, "Set how long a volume's past is kept.", |m| on(m, retain::retain)),
        at(POST, "/v1/volumes/{tenant}/{volume}/rescue", Operator, "Make a lost head anew.", |m| on(m, api::rescue)),
        at(POST, "/v1/volumes/{tenant}/{volume}/sync", Admin, "Wait until all that was acknowledged is in the store.", |m| on(m, api::sync)),
        at(POST, "/v1/volumes/{tenant}/{volume}/verify", Admin, "Check a volume, or a snapshot, in the store.", |m| on(m, api::verify)),
        at(GET, "/v1/volumes/{tenant}/{volume}/verify", Read, "How far the check under way is.", |m| on(m, api::verify_progress)),
        at(POST, "/v1/volumes/{tenant}/{volume}/warm", Admin, "Fetch a volume into the cache.", |m| on(m, warm::warm)),
        at(GET, "/v1/volumes/{tenant}/{volume}/warm", Read, "How far the warming under way is.", |m| on(m, warm::progress)),
        at(POST, "/v1/volumes/{tenant}/{volume}/evict", Admin, "Drop a volume from the cache.", |m| on(m, warm::evict)),
        at(POST, "/v1/volumes/{tenant}/{volume}/compact", Admin, "Put a volume's data in order in the store.", |m| on(m, chores::compact)),
        at(GET, "/v1/volumes/{tenant}/{volume}/compact", Read, "How far the compacting or flattening under way is.", |m| on(m, chores::progress)),
        at(POST, "/v1/volumes/{tenant}/{volume}/flatten", Admin, "Make a clone need nothing of its parent.", |m| on(m, chores::flatten)),
        at(GET, "/v1/snapshots", Read, "All snapshots.", |m| on(m, api::list_all_snapshots)),
        at(GET, "/v1/volumes/{tenant}/{volume}/snapshots", Read, "A volume's snapshots.", |m| on(m, api::list_snapshots)),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots", Admin, "Give a volume's state a name.", |m| on(m, api::create_snapshot)),
        at(GET, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", Read, "A snapshot.", |m| on(m, api::show_snapshot)),
        at(DELETE, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", Admin, "Delete a snapshot that has no clones.", |m| on(m, api::delete_snapshot)),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/clone", Admin, "Make a volume that starts as the snapshot is.", |m| on(m, api::clone_snapshot)),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/rollback", Admin, "Make a detached volume what the snapshot is.", |m| on(m, api::rollback)),
        at(GET, "/v1/trash", Read, "Deleted volumes.", |m| on(m, trash::list)),
        at(POST, "/v1/trash/restore", Admin, "Bring a volume back.", |m| on(m, trash::restore)),
        at(POST, "/v1/trash/purge", Admin, "Delete volumes of the trash for ever.", |m| on(m, trash::purge)),
        at(GET, "/v1/tokens", Operator, "Tokens, without their secrets.", |m| on(m, token::list)),
        at(POST, "/v1/tokens", Operator, "Make a token. Its text is in the answer, and cannot be had again.", |m| on(m, token::create)),
        at(DELETE, "/v1/tokens/{token}", Operator, "Take a token back.", |m| on(m, token::revoke)),
        at(GET, "/v1/status", Operator, "How the daemon does.", |m| on(m, api::status)),
        at(GET, "/metrics", Operator, "All metrics, in Prometheus' text format.", |m| on(m, api::metrics)),
        at(GET, "/readyz", Operator, "Whether the daemon can serve; if not, why.", |m| on(m, api::ready)),
        at(GET, "/healthz", Nothing, "That the daemon runs.", |m| on(m, api::healthy)),
    ]
});

/// Everything, each endpoint behind its guard.
pub(super) fn guarded(engine: &Arc<dyn Engine>, access: &Arc<Access>) -> Router {
    let mut routes = Router::new();
    for endpoint in ENDPOINTS.iter() {
        let state = Guard {
            access: Arc::clone(access),
            engine: Arc::clone(engine),
            endpoint,
        };
        let router = endpoint
            .router()
            .route_layer(from_fn_with_state(state, guard));
        routes = routes.route(endpoint.path, router);
    }
    finish(routes)
}

/// Everything, for callers who are known to be operators.
pub fn routes(engine: Arc<dyn Engine>) -> Router {
    let who = "the program itself".to_owned();
    let caller = Caller::Operator { who };
    guarded(&engine, &Arc::default()).layer(axum::Extension(caller))
}

/// Health and metrics, for whoever reaches the listener.
pub(super) fn health_routes(engine: Arc<dyn Engine>) -> Router {
    let mut routes = Router::new();
    for endpoint in ENDPOINTS.iter().filter(|e| !e.path.starts_with("/v1/")) {
        routes = routes.route(endpoint.path, endpoint.router());
    }
    finish(routes.layer(from_fn(
        move |mut request: axum::extract::Request, next: axum::middleware::Next| {
            request.extensions_mut().insert(Reach(Arc::clone(&engine)));
            next.run(request)
        },
    )))
}

fn finish(routes: Router) -> Router {
    routes
        .fallback(async || {
            let message = "the API has no such path";
            ApiError::new(Kind::NotFound, message, "see the paths under /v1")
        })
        .method_not_allowed_fallback(async || {
            let error =
                ApiError::invalid("the path does not know this method", "see the Allow header");
            response(StatusCode::METHOD_NOT_ALLOWED, error)
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}
