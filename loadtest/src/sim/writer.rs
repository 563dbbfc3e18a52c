//! Paces tokens and turns them into events of a stream. `generation` starts and ends the stream.

use std::time::Duration;

use tokio::time::{self, Instant};

use super::{
    chat, completions,
    config::Role,
    generate::{Object, Part, Times},
    generation::{Run, aborted},
    messages_api,
    output::{Finish, Output, PromptLogprobs, Token, prompt_logprobs},
    request::{Endpoint, Item, unix_time},
    responses_api,
    transfer::cancelled,
};

/// When the next token is due.
pub(crate) struct Pace {
    due: Option<Instant>,
    step: Duration,
}

impl Pace {
    pub(crate) fn new(run: &Run) -> Self {
        let config = &run.state.config;
        let idle = config.role == Role::Prefill || (config.first_token + config.inter_token).is_zero();
        Self { due: (!idle).then(|| Instant::now() + config.first_token), step: config.inter_token }
    }

    /// Waits for the next token; returns false if the item is cancelled instead.
    pub(crate) async fn next(&mut self, item: &Item) -> bool {
        let Some(due) = self.due else { return !*item.cancel.borrow() };
        self.due = Some(due + self.step);
        tokio::select! {
            biased;
            () = cancelled(item) => false,
            () = time::sleep_until(due) => true,
        }
    }
}

/// Turns tokens into events for one item.
pub(crate) struct Writer<'a> {
    pub run: &'a Run,
    pub at: usize,
    pub item: &'a Item,
    pub times: Times,
    pub prompt: PromptLogprobs,
    messages: messages_api::Stream,
    responses: Option<responses_api::Stream>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(run: &'a Run, at: usize, item: &'a Item, times: Times) -> Self {
        Self {
            run,
            at,
            item,
            times,
            prompt: prompt_logprobs(item, run.role()),
            messages: messages_api::Stream::default(),
            responses: run.request.settings.as_deref().map(responses_api::Stream::new),
        }
    }

    fn index(&self, sample: usize) -> usize {
        self.at * self.run.request.n + sample
    }

    pub(crate) async fn begin(&self) {
        if self.run.request.endpoint == Endpoint::Chat {
            for sample in 0..self.run.request.n {
                self.run.send_event(chat::role_event(&self.run.envelope(), self.index(sample))).await;
            }
        }
    }

    /// An output without tokens.
    pub(crate) async fn nothing(&mut self, samples: &mut [Output]) {
        for (sample, output) in samples.iter_mut().enumerate() {
            output.finish = Some(Finish::Length(0));
            self.write(sample, output, 0, None).await;
        }
    }

    pub(crate) async fn step(&mut self, sample: usize, output: &mut Output, alive: bool) {
        let before = output.produced;
        let token = if alive {
            Some(output.push(self.item, self.run.role()))
        } else {
            output.finish = Some(aborted());
            None
        };
        if before == 0 {
            self.times.first_token = unix_time();
        }
        if !self.run.out.is_closed() {
            self.write(sample, output, before, token).await;
        }
        if self.run.state.config.incremental_output || self.run.request.endpoint != Endpoint::Generate {
            output.cut();
        }
    }

    async fn write(&mut self, sample: usize, output: &Output, before: usize, token: Option<Token>) {
        let (run, index) = (self.run, self.index(sample));
        match run.request.endpoint {
            Endpoint::Generate => run.send_event(self.object(index, output, before)).await,
            Endpoint::Completions => {
                let range = before..output.produced;
                let envelope = run.envelope();
                run.send_event(completions::event(&envelope, &run.request, run.role(), index, output, range))
                    .await;
            }
            Endpoint::Chat => self.write_chat(index, output, token).await,
            Endpoint::Messages => run.send_frames(self.messages.step(run, output)).await,
            Endpoint::Responses => {
                if let (Some(stream), Some(settings)) = (&mut self.responses, &run.request.settings) {
                    run.send_frames(stream.step(run, settings, output)).await;
                }
            }
        }
    }

    fn object(&self, index: usize, output: &Output, before: usize) -> Vec<u8> {
        let part = match (before, &output.finish) {
            (0, Some(_)) => Part::Whole,
            (0, None) => Part::First,
            (_, None) => Part::Middle,
            (_, Some(_)) => Part::Last,
        };
        let many = self.run.request.batch || self.run.request.n > 1;
        let object = Object {
            role: self.run.role(),
            item: self.item,
            omits_lists: self.run.state.config.rust_front_end,
            prompt: &self.prompt,
            times: self.times,
            index: many.then_some(index),
        };
        let mut payload = Vec::new();
        object.write(&mut payload, output, part);
        payload
    }

    async fn write_chat(&self, index: usize, output: &Output, token: Option<Token>) {
        let (run, envelope) = (self.run, self.run.envelope());
        let tool = run.request.tool.as_ref().filter(|_| run.role() != Role::Prefill);
        match (tool, token) {
            (None, Some(token)) => {
                run.send_event(chat::token_event(&envelope, &run.request, self.item, index, output, token))
                    .await;
            }
            (Some(tool), _) if output.finish.is_some() => {
                for event in chat::tool_events(&envelope, index, tool) {
                    run.send_event(event).await;
                }
            }
            _ => {}
        }
        if output.finish.is_some() {
            run.send_event(chat::finish_event(&envelope, index, output.finish.as_ref(), tool.is_some()))
                .await;
        }
    }
}
