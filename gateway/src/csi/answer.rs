//! Running calls, and what the API's errors are in CSI.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tonic::{Code, Response, Status};

use crate::control::{ApiError, Kind};
use crate::places::Places;

/// What a call answers.
pub(super) type Answer<T> = Result<T, Status>;
/// The same, as it is sent.
pub(super) type Answered<T> = Result<Response<T>, Status>;

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NotFound,
            Kind::Exists => Code::AlreadyExists,
            Kind::Conflict | Kind::Unsupported => Code::FailedPrecondition,
            Kind::Invalid => Code::InvalidArgument,
            Kind::Denied => Code::PermissionDenied,
            Kind::Unavailable => Code::Unavailable,
            Kind::Damaged => Code::DataLoss,
            Kind::Internal => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

/// As [`Status::from`], where the only conflict there can be is with a quota.
pub(super) fn quota(error: ApiError) -> Status {
    match error.kind {
        Kind::Conflict => Status::resource_exhausted(error.to_string()),
        _ => error.into(),
    }
}

/// The field's value.
///
/// # Errors
/// If it is missing.
pub(super) fn given<'a>(value: &'a str, field: &str) -> Answer<&'a str> {
    match value {
        "" => Err(Status::invalid_argument(format!("{field} is missing"))),
        value => Ok(value),
    }
}

/// Calls under way at most that change something; more wait.
const CALLS_MAX: u32 = 64;

/// The calls under way.
#[derive(Clone)]
pub(super) struct Calls {
    /// One a volume or snapshot.
    busy: Places<String>,
    running: Arc<Semaphore>,
}

impl Calls {
    /// None yet.
    pub fn new() -> Self {
        Self {
            busy: Places::default(),
            running: Arc::new(Semaphore::new(CALLS_MAX as usize)),
        }
    }

    /// The same for calls that are not to wait for these.
    pub fn apart(&self) -> Self {
        Self {
            busy: Places::default(),
            running: Arc::clone(&self.running),
        }
    }

    /// Waits until all are done; who calls then waits for ever.
    pub async fn end(&self) {
        if let Ok(all) = self.running.acquire_many(CALLS_MAX).await {
            all.forget();
        }
    }

    /// Runs a call that changes something of `subject` to its end, even if nobody waits for it any more: a child of
    /// it may be formatting the device.
    ///
    /// # Errors
    /// The call's; `ABORTED` while there is another.
    pub async fn run<T: Send + 'static>(
        &self,
        call: &'static str,
        subject: &str,
        work: impl Future<Output = Answer<T>> + Send + 'static,
    ) -> Answered<T> {
        let subject = subject.to_owned();
        let Some(place) = self.busy.take(&subject, 1) else {
            let message = format!("another call is under way for {subject:?}: try again");
            return Err(Status::aborted(message));
        };
        let running = Arc::clone(&self.running).acquire_owned().await;
        let task = tokio::spawn(async move {
            let _held = (place, running);
            let begun = Instant::now();
            let answer = work.await;
            let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            match &answer {
                Ok(_) => tracing::info!(call, ?subject, ms, "done"),
                Err(status) => {
                    tracing::warn!(call, ?subject, ms, code = ?status.code(), error = status.message(), "failed");
                }
            }
            answer
        });
        match task.await {
            Ok(answer) => answer.map(Response::new),
            Err(error) => {
                tracing::error!(call, %error, "broke off");
                Err(Status::internal(
                    "the call broke off by a mistake of the driver",
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn second_call_for_a_volume_is_aborted_until_the_first_ends_though_nobody_waits_for_it() {
        let calls = Calls::new();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let first = calls.run("Stage", "acme/db", async move {
            let _ = gone.await;
            Ok(1)
        });
        // The caller hangs up.
        let hung_up = tokio::time::timeout(Duration::from_millis(20), first).await;
        assert!(hung_up.is_err());
        let second = calls.run("Stage", "acme/db", async { Ok(2) }).await;
        assert_eq!(second.unwrap_err().code(), Code::Aborted);
        let other = calls.run("Stage", "acme/other", async { Ok(3) }).await;
        assert_eq!(other.unwrap().into_inner(), 3);
        let end = tokio::time::timeout(Duration::from_millis(20), calls.end()).await;
        assert!(end.is_err(), "a call is under way");
        go.send(()).unwrap();
        while calls
            .run("Stage", "acme/db", async { Ok(4) })
            .await
            .is_err()
        {
            tokio::task::yield_now().await;
        }
        calls.end().await;
    }

    #[test]
    fn errors_of_the_api_have_the_codes_that_the_caller_is_to_act_upon() {
        let code = |kind| Status::from(ApiError::new(kind, "m", "r")).code();
        assert_eq!(code(Kind::Conflict), Code::FailedPrecondition);
        assert_eq!(code(Kind::Unavailable), Code::Unavailable);
        assert_eq!(code(Kind::Exists), Code::AlreadyExists);
        let full = quota(ApiError::new(Kind::Conflict, "m", "r"));
        assert_eq!(full.code(), Code::ResourceExhausted);
        assert_eq!(full.message(), "m; r");
    }
}
