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
use schemars::JsonSchema;

use super::access::guard::{Reach, guard};
use super::access::{Access, Caller, Guard, Needs};
use super::activity::Activity;
use super::api::{self, BODY_BYTES_MAX};
use super::chores::{CompactSpec, MoveReport};
use super::doctor::DoctorReport;
use super::dto::{
    AttachInfo, AttachOptions, CloneSpec, DetachInfo, RescueReport, RescueSpec, ResizeInfo,
    ResizeSpec, SnapshotInfo, SnapshotList, SnapshotSpec, StatusInfo, VerifyProgress, VerifyReport,
    VerifySpec, VolumeInfo, VolumeList, VolumeSpec,
};
use super::error::response;
use super::openapi::{MakeSchema, of};
use super::page::{PageQuery, TenantPageQuery};
use super::rates::{RatesInfo, RatesSpec};
use super::rekey::{RekeyInfo, RekeySpec};
use super::release::{ReleaseInfo, ReleaseSpec};
use super::retain::{RetainInfo, RetainSpec};
use super::status_page::this_host_only;
use super::tenant::{SettingsDoc, SuspendSpec, TenantInfo, TenantList, TenantSpec};
use super::token::{TokenList, TokenMade, TokenSpec};
use super::trash::{PurgeReport, PurgeSpec, RestoreSpec, TrashInfo, TrashList};
use super::warm::{EvictInfo, WarmReport, WarmSpec};
use super::{
    ApiError, Engine, Kind, activity, chores, doctor, openapi, rates, rekey, release, retain,
    status_page, tenant, token, trash, warm,
};

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
    /// Its query.
    pub(super) query: Option<MakeSchema>,
    /// Its body.
    pub(super) takes: Option<MakeSchema>,
    /// The statuses of success.
    pub(super) statuses: &'static [u16],
    /// What it answers with, as JSON.
    pub(super) gives: Option<MakeSchema>,
    /// What it answers with, if that is no JSON.
    pub(super) media: Option<&'static str>,
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

/// An endpoint that answers 204 and nothing else.
const fn at(
    method: Method,
    path: &'static str,
    needs: Needs,
    serve: fn(MethodFilter) -> MethodRouter,
    about: &'static str,
) -> Endpoint {
    Endpoint {
        method,
        path,
        needs,
        about,
        query: None,
        takes: None,
        statuses: &[204],
        gives: None,
        media: None,
        serve,
    }
}

impl Endpoint {
    /// Its query is a `T`.
    fn asks<T: JsonSchema>(self) -> Self {
        let query = Some(of::<T> as MakeSchema);
        Self { query, ..self }
    }

    /// Its body is a `T`.
    fn takes<T: JsonSchema>(self) -> Self {
        let takes = Some(of::<T> as MakeSchema);
        Self { takes, ..self }
    }

    /// It answers with a `T`.
    fn gives<T: JsonSchema>(self) -> Self {
        let gives = Some(of::<T> as MakeSchema);
        Self {
            gives,
            statuses: &[200],
            ..self
        }
    }

    /// It answers with a `T`, or 204 and nothing.
    fn may_give<T: JsonSchema>(self) -> Self {
        Self {
            statuses: &[200, 204],
            ..self.gives::<T>()
        }
    }

    /// It makes a `T` (201), or answers with one that is there and the same (200).
    fn makes<T: JsonSchema>(self) -> Self {
        Self {
            statuses: &[200, 201],
            ..self.gives::<T>()
        }
    }

    /// It makes another `T` each time.
    fn makes_new<T: JsonSchema>(self) -> Self {
        Self {
            statuses: &[201],
            ..self.gives::<T>()
        }
    }

    /// It answers with something of this media type.
    fn tells(self, media: &'static str) -> Self {
        Self {
            media: Some(media),
            statuses: &[200],
            ..self
        }
    }
}

/// All endpoints.
#[rustfmt::skip]
pub static ENDPOINTS: LazyLock<Vec<Endpoint>> = LazyLock::new(|| {
    use Needs::{Admin, Nothing, Operator, Read};
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const PATCH: Method = Method::PATCH;
    const DELETE: Method = Method::DELETE;
    vec![
        at(GET, "/v1/tenants", Read, |m| on(m, tenant::list), "All tenants; to a tenant, itself.")
            .asks::<PageQuery>().gives::<TenantList>(),
        at(POST, "/v1/tenants", Operator, |m| on(m, tenant::create),
            "Make a tenant, whose store is looked at first.")
            .takes::<TenantSpec>().makes::<TenantInfo>(),
        at(GET, "/v1/tenants/{tenant}", Read, |m| on(m, tenant::show), "A tenant, with what it has.")
            .gives::<TenantInfo>(),
        at(PATCH, "/v1/tenants/{tenant}", Operator, |m| on(m, tenant::update),
            "Change what a tenant may have: a JSON merge patch of its settings.")
            .takes::<SettingsDoc>().gives::<TenantInfo>(),
        at(POST, "/v1/tenants/{tenant}/suspend", Operator, |m| on(m, tenant::suspend),
            "Hold a tenant's volumes up.")
            .takes::<SuspendSpec>().gives::<TenantInfo>(),
        at(POST, "/v1/tenants/{tenant}/resume", Operator, |m| on(m, tenant::resume),
            "Let a suspended tenant's volumes go on.")
            .gives::<TenantInfo>(),
        at(DELETE, "/v1/tenants/{tenant}", Operator, |m| on(m, tenant::delete),
            "Delete a tenant that has no volumes.")
            .asks::<tenant::TenantDelete>(),
        at(GET, "/v1/volumes", Read, |m| on(m, api::list_volumes), "Volumes.")
            .asks::<TenantPageQuery>().gives::<VolumeList>(),
        at(POST, "/v1/volumes", Admin, |m| on(m, api::create_volume), "Make a volume that reads as zeroes.")
            .takes::<VolumeSpec>().makes::<VolumeInfo>(),
        at(GET, "/v1/volumes/{tenant}/{volume}", Read, |m| on(m, api::show_volume),
            "A volume, or a snapshot of it as it is attached.")
            .gives::<VolumeInfo>(),
        at(DELETE, "/v1/volumes/{tenant}/{volume}", Admin, |m| on(m, api::delete_volume),
            "Put a volume into the trash.")
            .asks::<api::VolumeDelete>().gives::<TrashInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/attach", Admin, |m| on(m, api::attach),
            "Attach a volume, or a snapshot, to the host.")
            .takes::<AttachOptions>().gives::<AttachInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/detach", Admin, |m| on(m, api::detach),
            "Detach it; with an answer if somebody else has the volume and not all was sent.")
            .may_give::<DetachInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/resize", Admin, |m| on(m, api::resize), "Change a volume's size.")
            .takes::<ResizeSpec>().gives::<ResizeInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/retain", Admin, |m| on(m, retain::retain),
            "Set how long a volume's past is kept.")
            .takes::<RetainSpec>().gives::<RetainInfo>(),
        at(PUT, "/v1/volumes/{tenant}/{volume}/rates", Admin, |m| on(m, rates::set_rates),
            "Set how fast a volume may be used.")
            .takes::<RatesSpec>().gives::<RatesInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/rekey", Admin, |m| on(m, rekey::rekey),
            "Wrap a volume's data keys by another key, or give it a new data key.")
            .takes::<RekeySpec>().gives::<RekeyInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/release", Operator, |m| on(m, release::release),
            "Take the right to write from a host that is lost, and give it to nobody.")
            .takes::<ReleaseSpec>().gives::<ReleaseInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/rescue", Operator, |m| on(m, api::rescue), "Make a lost head anew.")
            .takes::<RescueSpec>().gives::<RescueReport>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/sync", Admin, |m| on(m, api::sync),
            "Wait until all that was acknowledged is in the store."),
        at(POST, "/v1/volumes/{tenant}/{volume}/verify", Admin, |m| on(m, api::verify),
            "Check a volume, or a snapshot, in the store.")
            .takes::<VerifySpec>().gives::<VerifyReport>(),
        at(GET, "/v1/volumes/{tenant}/{volume}/verify", Read, |m| on(m, api::verify_progress),
            "How far the check under way is.")
            .gives::<VerifyProgress>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/warm", Admin, |m| on(m, warm::warm), "Fetch a volume into the cache.")
            .takes::<WarmSpec>().gives::<WarmReport>(),
        at(GET, "/v1/volumes/{tenant}/{volume}/warm", Read, |m| on(m, warm::progress),
            "How far the warming under way is.")
            .gives::<WarmReport>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/evict", Admin, |m| on(m, warm::evict),
            "Drop a volume from the cache.")
            .gives::<EvictInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/compact", Admin, |m| on(m, chores::compact),
            "Put a volume's data in order in the store.")
            .takes::<CompactSpec>().gives::<MoveReport>(),
        at(GET, "/v1/volumes/{tenant}/{volume}/compact", Read, |m| on(m, chores::progress),
            "How far the compacting or flattening under way is.")
            .gives::<MoveReport>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/flatten", Admin, |m| on(m, chores::flatten),
            "Make a clone need nothing of its parent.")
            .gives::<MoveReport>(),
        at(GET, "/v1/snapshots", Read, |m| on(m, api::list_all_snapshots), "All snapshots.")
            .asks::<PageQuery>().gives::<SnapshotList>(),
        at(GET, "/v1/volumes/{tenant}/{volume}/snapshots", Read, |m| on(m, api::list_snapshots),
            "A volume's snapshots.")
            .asks::<PageQuery>().gives::<SnapshotList>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots", Admin, |m| on(m, api::create_snapshot),
            "Give a volume's state a name.")
            .takes::<SnapshotSpec>().makes::<SnapshotInfo>(),
        at(GET, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", Read, |m| on(m, api::show_snapshot),
            "A snapshot.")
            .gives::<SnapshotInfo>(),
        at(DELETE, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", Admin, |m| on(m, api::delete_snapshot),
            "Delete a snapshot that has no clones."),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/clone", Admin, |m| on(m, api::clone_snapshot),
            "Make a volume that starts as the snapshot is.")
            .takes::<CloneSpec>().makes::<VolumeInfo>(),
        at(POST, "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/rollback", Admin, |m| on(m, api::rollback),
            "Make a detached volume what the snapshot is.")
            .gives::<VolumeInfo>(),
        at(GET, "/v1/trash", Read, |m| on(m, trash::list), "Deleted volumes.")
            .asks::<TenantPageQuery>().gives::<TrashList>(),
        at(POST, "/v1/trash/restore", Admin, |m| on(m, trash::restore), "Bring a volume back.")
            .takes::<RestoreSpec>().gives::<VolumeInfo>(),
        at(POST, "/v1/trash/purge", Admin, |m| on(m, trash::purge), "Delete volumes of the trash for ever.")
            .takes::<PurgeSpec>().gives::<PurgeReport>(),
        at(GET, "/v1/tokens", Operator, |m| on(m, token::list), "Tokens, without their secrets.")
            .asks::<TenantPageQuery>().gives::<TokenList>(),
        at(POST, "/v1/tokens", Operator, |m| on(m, token::create),
            "Make a token. Its text is in the answer, and cannot be had again.")
            .takes::<TokenSpec>().makes_new::<TokenMade>(),
        at(DELETE, "/v1/tokens/{token}", Operator, |m| on(m, token::revoke),
            "Take a token back."),
        at(GET, "/v1/openapi.json", Nothing, |m| on(m, openapi::serve), "The API's document.")
            .tells("application/json"),
        at(POST, "/v1/doctor", Operator, |m| on(m, doctor::doctor),
            "Look for what is not as it should be, and say what to change.")
            .gives::<DoctorReport>(),
        at(GET, "/v1/status", Operator, |m| on(m, api::status), "How the daemon does.")
            .gives::<StatusInfo>(),
        at(GET, ACTIVITY, Read, |m| on(m, activity::activity),
            "What goes on: counters of what is attached here, by two of which rates are made; to operators how the daemon does, too.")
            .gives::<Activity>(),
        at(GET, "/", Nothing, |m| on(m, status_page::page), "The status page, which asks for the rest itself.")
            .tells("text/html"),
        at(GET, "/metrics", Operator, |m| on(m, api::metrics), "All metrics, in Prometheus' text format.")
            .tells("text/plain"),
        at(GET, "/readyz", Operator, |m| on(m, api::ready), "Whether the daemon can serve; if not, why.")
            .tells("text/plain"),
        at(GET, "/healthz", Nothing, |m| on(m, api::healthy), "That the daemon runs.")
            .tells("text/plain"),
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

/// What the status page asks for.
const ACTIVITY: &str = "/v1/activity";

/// Health, metrics and the status page for whoever reaches the listener, and what is in the page for this host.
pub(super) fn health_routes(engine: Arc<dyn Engine>) -> Router {
    let mut routes = Router::new();
    for endpoint in ENDPOINTS.iter() {
        let router = match endpoint.path {
            ACTIVITY => endpoint.router().route_layer(from_fn(this_host_only)),
            path if path.starts_with("/v1/") => continue,
            _ => endpoint.router(),
        };
        routes = routes.route(endpoint.path, router);
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
