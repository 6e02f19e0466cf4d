BEGIN TRANSACTION;
CREATE TABLE architecture (
	digest VARCHAR(64) NOT NULL, 
	text TEXT NOT NULL, 
	canonical TEXT NOT NULL, 
	width INTEGER NOT NULL, 
	depth INTEGER NOT NULL, 
	mixers TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_architecture PRIMARY KEY (digest)
);
INSERT INTO "architecture" VALUES('6e1aa95bd2bcd1038cd00df847de8fa446b41fc471cc89ccc2c34297c51a7682','lm(0 * (attn + swiglu), width=16)','{"n":0}',16,0,'attn swiglu','2026-11-22 20:07:06.723193');
INSERT INTO "architecture" VALUES('2ece68369d8728d9b0fcc388820fab2e03fbc0bc81c36926c6723ad4e20d9d5d','lm(1 * (attn + swiglu), width=32)','{"n":1}',32,2,'attn swiglu','2026-11-22 20:07:06.746448');
INSERT INTO "architecture" VALUES('a11c0924fd03c6762c1f8100e07418834aeca414cb783fcc5d03d717a74e6c8f','lm(2 * (attn + swiglu), width=48)','{"n":2}',48,4,'attn swiglu','2026-11-22 20:07:06.757464');
CREATE TABLE attempt (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	trial_id INTEGER NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	worker VARCHAR(200) NOT NULL, 
	started_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	seconds FLOAT, 
	outcome VARCHAR(32), 
	reason TEXT, 
	trace TEXT, 
	CONSTRAINT fk_attempt_trial_id FOREIGN KEY(trial_id) REFERENCES trial (id)
);
INSERT INTO "attempt" VALUES(1,1,'train','w','2026-11-22 20:07:06.725130','2026-11-22 20:07:06.727818',1.0,'ok',NULL,NULL);
INSERT INTO "attempt" VALUES(2,1,'profile','w','2026-11-22 20:07:06.738342','2026-11-22 20:07:06.739880',0.5,'ok',NULL,NULL);
INSERT INTO "attempt" VALUES(3,2,'train','w','2026-11-22 20:07:06.747784','2026-11-22 20:07:06.749094',1.0,'ok',NULL,NULL);
INSERT INTO "attempt" VALUES(4,2,'profile','w','2026-11-22 20:07:06.752844','2026-11-22 20:07:06.753841',0.5,'ok',NULL,NULL);
INSERT INTO "attempt" VALUES(5,3,'train','host:2','2026-11-22 20:07:06.758401',NULL,NULL,NULL,NULL,NULL);
CREATE TABLE campaign (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name VARCHAR(200) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	text TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT uq_campaign_name UNIQUE (name)
);
INSERT INTO "campaign" VALUES(1,'laptop','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','[campaign]
name = ''laptop''
',7,'2026-11-22 20:07:06.719524');
CREATE TABLE environment (
	digest VARCHAR(64) NOT NULL, 
	device VARCHAR(200) NOT NULL, 
	device_kind VARCHAR(16) NOT NULL, 
	torch VARCHAR(64) NOT NULL, 
	mixforge VARCHAR(64) NOT NULL, 
	"commit" VARCHAR(64), 
	host VARCHAR(64) NOT NULL, 
	details JSON NOT NULL, 
	CONSTRAINT pk_environment PRIMARY KEY (digest)
);
INSERT INTO "environment" VALUES('b7001cf96dba78eb426e7d01c31769ee05219724c4ee15bee9c0266bdaeb2a6b','Test CPU','cpu','2.13.0','0.1.0','0123abc','0f0f','{"device":"Test CPU","device_kind":"cpu","device_count":2,"driver":null,"clock_mhz":2400.0,"threads":1,"python":"3.11.7","torch":"2.13.0","triton":null,"mixforge":"0.1.0","commit":"0123abc","host":"0f0f","system":"Linux"}');
CREATE TABLE evaluation (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	architecture VARCHAR(64) NOT NULL, 
	budget VARCHAR(64) NOT NULL, 
	attempt_id INTEGER, 
	outcome VARCHAR(32) NOT NULL, 
	reason TEXT, 
	trace TEXT, 
	context BIGINT NOT NULL, 
	params BIGINT NOT NULL, 
	flops BIGINT NOT NULL, 
	state_bytes BIGINT NOT NULL, 
	decode_bytes BIGINT NOT NULL, 
	bits_per_byte FLOAT, 
	bits_per_byte_test FLOAT, 
	recall FLOAT, 
	recall_test FLOAT, 
	train_tokens BIGINT NOT NULL, 
	train_s FLOAT NOT NULL, 
	curves JSON NOT NULL, 
	backend VARCHAR(32) NOT NULL, 
	seed BIGINT NOT NULL, 
	environment VARCHAR(64) NOT NULL, 
	weights TEXT, 
	recorded_at DATETIME NOT NULL, copying FLOAT, copying_test FLOAT, tracking FLOAT, tracking_test FLOAT, selectivity FLOAT, selectivity_test FLOAT, 
	CONSTRAINT fk_evaluation_architecture FOREIGN KEY(architecture) REFERENCES architecture (digest), 
	CONSTRAINT fk_evaluation_attempt_id FOREIGN KEY(attempt_id) REFERENCES attempt (id), 
	CONSTRAINT fk_evaluation_environment FOREIGN KEY(environment) REFERENCES environment (digest), 
	CONSTRAINT uq_evaluation_architecture_budget UNIQUE (architecture, budget)
);
INSERT INTO "evaluation" VALUES(1,'6e1aa95bd2bcd1038cd00df847de8fa446b41fc471cc89ccc2c34297c51a7682','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',1,'ok',NULL,NULL,512,123456789012,1152921504606846976,4096,8192,2.5,2.6,0.25,NULL,1000,1.5,'[{"task":"text","steps":[1,10],"loss":[5.5,0.3333333333333333]}]','torch',1099511627776,'b7001cf96dba78eb426e7d01c31769ee05219724c4ee15bee9c0266bdaeb2a6b',NULL,'2026-11-22 20:07:06.727818',0.75,0.5,NULL,NULL,0.375,0.125);
INSERT INTO "evaluation" VALUES(2,'2ece68369d8728d9b0fcc388820fab2e03fbc0bc81c36926c6723ad4e20d9d5d','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',3,'ok',NULL,NULL,512,123456789012,1152921504606846976,4096,8192,2.0,2.1,0.25,NULL,1000,1.5,'[{"task":"text","steps":[1,10],"loss":[5.5,0.3333333333333333]}]','torch',1099511627776,'b7001cf96dba78eb426e7d01c31769ee05219724c4ee15bee9c0266bdaeb2a6b',NULL,'2026-11-22 20:07:06.749094',NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE mixforge_schema (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT mixforge_schema_pkc PRIMARY KEY (version_num)
);
INSERT INTO "mixforge_schema" VALUES('0003');
CREATE TABLE profile (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	architecture VARCHAR(64) NOT NULL, 
	budget VARCHAR(64), 
	attempt_id INTEGER, 
	outcome VARCHAR(32) NOT NULL, 
	reason TEXT, 
	trace TEXT, 
	batch BIGINT NOT NULL, 
	context BIGINT NOT NULL, 
	dtype VARCHAR(16) NOT NULL, 
	backend VARCHAR(32) NOT NULL, 
	environment VARCHAR(64) NOT NULL, 
	prefill_ms FLOAT, 
	prefill_ms_spread FLOAT, 
	decode_ms FLOAT, 
	decode_ms_spread FLOAT, 
	train_ms FLOAT, 
	train_ms_spread FLOAT, 
	peak_bytes BIGINT, 
	timings JSON NOT NULL, 
	recorded_at DATETIME NOT NULL, 
	CONSTRAINT fk_profile_architecture FOREIGN KEY(architecture) REFERENCES architecture (digest), 
	CONSTRAINT fk_profile_attempt_id FOREIGN KEY(attempt_id) REFERENCES attempt (id), 
	CONSTRAINT fk_profile_environment FOREIGN KEY(environment) REFERENCES environment (digest)
);
INSERT INTO "profile" VALUES(1,'6e1aa95bd2bcd1038cd00df847de8fa446b41fc471cc89ccc2c34297c51a7682','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',2,'ok',NULL,NULL,2,64,'float32','torch','b7001cf96dba78eb426e7d01c31769ee05219724c4ee15bee9c0266bdaeb2a6b',0.6,1.49999999999999911182e-01,0.6,1.49999999999999911182e-01,0.6,1.49999999999999911182e-01,10000000,'[{"phase":"prefill","raw_ms":[0.5,0.6,0.8],"captured":false},{"phase":"decode","raw_ms":[0.5,0.6,0.8],"captured":false},{"phase":"train","raw_ms":[0.5,0.6,0.8],"captured":false}]','2026-11-22 20:07:06.739880');
INSERT INTO "profile" VALUES(2,'2ece68369d8728d9b0fcc388820fab2e03fbc0bc81c36926c6723ad4e20d9d5d','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',4,'ok',NULL,NULL,2,64,'float32','torch','b7001cf96dba78eb426e7d01c31769ee05219724c4ee15bee9c0266bdaeb2a6b',1.1,1.50000000000000133226e-01,1.1,1.50000000000000133226e-01,1.1,1.50000000000000133226e-01,10000000,'[{"phase":"prefill","raw_ms":[1.0,1.1,1.3],"captured":false},{"phase":"decode","raw_ms":[1.0,1.1,1.3],"captured":false},{"phase":"train","raw_ms":[1.0,1.1,1.3],"captured":false}]','2026-11-22 20:07:06.753841');
CREATE TABLE run (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	campaign_id INTEGER NOT NULL, 
	driver VARCHAR(200) NOT NULL, 
	started_at DATETIME NOT NULL, 
	seconds FLOAT NOT NULL, 
	ended_at DATETIME, 
	CONSTRAINT fk_run_campaign_id FOREIGN KEY(campaign_id) REFERENCES campaign (id)
);
INSERT INTO "run" VALUES(1,1,'host:1','2026-11-22 20:07:06.721392',90.0,'2026-11-22 20:07:06.722484');
CREATE TABLE trial (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	campaign_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	architecture VARCHAR(64) NOT NULL, 
	budget VARCHAR(64) NOT NULL, 
	origin VARCHAR(64) NOT NULL, 
	parent VARCHAR(64), 
	second_parent VARCHAR(64), 
	operator VARCHAR(64), 
	state VARCHAR(16) NOT NULL, 
	outcome VARCHAR(32), 
	reason TEXT, 
	token INTEGER, 
	reused BOOLEAN NOT NULL, 
	choices JSON NOT NULL, 
	attributes JSON NOT NULL, 
	rejected JSON NOT NULL, 
	proposed_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	bits_per_byte FLOAT, 
	recall FLOAT, 
	prefill_ms FLOAT, 
	prefill_ms_spread FLOAT, 
	decode_ms FLOAT, 
	decode_ms_spread FLOAT, 
	train_ms FLOAT, 
	train_ms_spread FLOAT, 
	peak_bytes BIGINT, 
	params BIGINT, 
	flops BIGINT, 
	state_bytes BIGINT, 
	decode_bytes BIGINT, copying FLOAT, tracking FLOAT, selectivity FLOAT, 
	CONSTRAINT fk_trial_architecture FOREIGN KEY(architecture) REFERENCES architecture (digest), 
	CONSTRAINT fk_trial_campaign_id FOREIGN KEY(campaign_id) REFERENCES campaign (id), 
	CONSTRAINT fk_trial_parent FOREIGN KEY(parent) REFERENCES architecture (digest), 
	CONSTRAINT fk_trial_second_parent FOREIGN KEY(second_parent) REFERENCES architecture (digest), 
	CONSTRAINT uq_trial_campaign_id_number UNIQUE (campaign_id, number)
);
INSERT INTO "trial" VALUES(1,1,0,'6e1aa95bd2bcd1038cd00df847de8fa446b41fc471cc89ccc2c34297c51a7682','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','random',NULL,NULL,NULL,'finished','ok',NULL,2,0,'[["stack[0]",0,"gdn",2]]','{"generation":0,"of":[1,2.5,null,"x"]}','{"too large":0}','2026-11-22 20:07:06.723207','2026-11-22 20:07:06.739880',2.5,0.25,0.6,1.49999999999999911182e-01,0.6,1.49999999999999911182e-01,0.6,1.49999999999999911182e-01,10000000,123456789012,1152921504606846976,4096,8192,0.75,NULL,0.375);
INSERT INTO "trial" VALUES(2,1,1,'2ece68369d8728d9b0fcc388820fab2e03fbc0bc81c36926c6723ad4e20d9d5d','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','random',NULL,NULL,NULL,'finished','ok',NULL,4,0,'[["stack[0]",1,"gdn",2]]','{"generation":1,"of":[1,2.5,null,"x"]}','{"too large":1}','2026-11-22 20:07:06.746462','2026-11-22 20:07:06.753841',2.0,0.25,1.1,1.50000000000000133226e-01,1.1,1.50000000000000133226e-01,1.1,1.50000000000000133226e-01,10000000,123456789012,1152921504606846976,4096,8192,NULL,NULL,NULL);
INSERT INTO "trial" VALUES(3,1,2,'a11c0924fd03c6762c1f8100e07418834aeca414cb783fcc5d03d717a74e6c8f','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','random','6e1aa95bd2bcd1038cd00df847de8fa446b41fc471cc89ccc2c34297c51a7682',NULL,'mutate','training',NULL,NULL,5,0,'[["stack[0]",0,"gdn",2]]','{"generation":2,"of":[1,2.5,null,"x"]}','{"too large":2}','2026-11-22 20:07:06.757476',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE INDEX ix_run_campaign_id ON run (campaign_id);
CREATE INDEX ix_trial_architecture ON trial (architecture);
CREATE INDEX ix_trial_campaign_id_state ON trial (campaign_id, state);
CREATE INDEX ix_attempt_trial_id ON attempt (trial_id);
CREATE INDEX ix_profile_architecture ON profile (architecture);
CREATE VIEW progress AS
SELECT campaign.name AS campaign, trial.origin, trial.state, trial.outcome,
    count(*) AS trials, sum(CASE WHEN trial.reused THEN 1 ELSE 0 END) AS reused
FROM trial
JOIN campaign ON campaign.id = trial.campaign_id
GROUP BY campaign.name, trial.origin, trial.state, trial.outcome;
CREATE VIEW failures AS
SELECT campaign.name AS campaign, trial.number, architecture.digest, architecture.text AS architecture,
    attempt.stage, attempt.worker, attempt.outcome, attempt.reason,
    attempt.started_at, attempt.ended_at, attempt.seconds
FROM attempt
JOIN trial ON trial.id = attempt.trial_id
JOIN campaign ON campaign.id = trial.campaign_id
JOIN architecture ON architecture.digest = trial.architecture
WHERE attempt.ended_at IS NOT NULL AND (attempt.outcome IS NULL OR attempt.outcome <> 'ok');
CREATE VIEW profiles AS
SELECT profile.id, architecture.digest, architecture.text AS architecture, profile.outcome,
    environment.device, profile.batch, profile.context, profile.dtype, profile.backend,
    profile.prefill_ms, profile.prefill_ms_spread, profile.decode_ms, profile.decode_ms_spread,
    profile.train_ms, profile.train_ms_spread, profile.peak_bytes, profile.recorded_at
FROM profile
JOIN architecture ON architecture.digest = profile.architecture
JOIN environment ON environment.digest = profile.environment;
CREATE VIEW trials AS
SELECT trial.id, campaign.name AS campaign, trial.number,
    architecture.digest, architecture.text AS architecture, architecture.width, architecture.depth,
    architecture.mixers,
    trial.budget, trial.origin, trial.operator, trial.parent, trial.second_parent,
    trial.state, trial.outcome, trial.reason, trial.reused,
    trial.bits_per_byte, evaluation.bits_per_byte_test, trial.recall, evaluation.recall_test,
    trial.copying, evaluation.copying_test, trial.tracking, evaluation.tracking_test,
    trial.selectivity, evaluation.selectivity_test,
    trial.prefill_ms, trial.prefill_ms_spread, trial.decode_ms, trial.decode_ms_spread,
    trial.train_ms, trial.train_ms_spread, trial.peak_bytes,
    trial.params, trial.flops, trial.state_bytes, trial.decode_bytes,
    evaluation.train_tokens, evaluation.train_s, trial.proposed_at, trial.finished_at
FROM trial
JOIN campaign ON campaign.id = trial.campaign_id
JOIN architecture ON architecture.digest = trial.architecture
LEFT JOIN evaluation ON evaluation.architecture = trial.architecture AND evaluation.budget = trial.budget;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('campaign',1);
INSERT INTO "sqlite_sequence" VALUES('run',1);
INSERT INTO "sqlite_sequence" VALUES('trial',3);
INSERT INTO "sqlite_sequence" VALUES('attempt',5);
INSERT INTO "sqlite_sequence" VALUES('evaluation',2);
INSERT INTO "sqlite_sequence" VALUES('profile',2);
COMMIT;
